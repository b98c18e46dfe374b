//! Values of flags. Errors read as the end of "invalid value '…' for '--flag': …" and name the
//! limit.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use itertools::Itertools as _;
use serde::de::DeserializeOwned;

use super::error::CliError;
use super::usage;
use crate::api::check_host_port;
use crate::core::{
    InstanceName, Invalid, LabelKey, LabelValue, Millis, Port, PortName, RangeName, Selector,
    limits,
};
use crate::proto::v1;

const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

fn limit(error: Invalid) -> String {
    format!("must be {}", error.limit)
}

/// The file of `--config`, in TOML.
pub fn config<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let shown = path.display();
    let text = fs::read_to_string(path)
        .map_err(|e| usage(format!("--config: {shown} cannot be read: {e}")))?;
    toml::from_str(&text).map_err(|e| usage(format!("--config: {shown}: {e}")))
}

/// Any of core's names, kept as text.
pub fn name<T: FromStr<Err = Invalid>>(text: &str) -> Result<String, String> {
    text.parse::<T>().map(|_| text.to_string()).map_err(limit)
}

pub fn selector(text: &str) -> Result<String, String> {
    Selector::parse(text).map(|_| text.to_string()).map_err(limit)
}

pub fn timeout(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|e| format!("must be a duration such as 500ms, 10s or 1m ({e})"))?;
    if duration < Duration::from_millis(1) || duration > TIMEOUT_MAX {
        return Err("must be 1ms to 24h".into());
    }
    Ok(duration)
}

/// A time to live, a deadline: 1 s to 24 h.
pub fn span_of_time(text: &str) -> Result<Duration, String> {
    let wanted = "must be 1s to 24h, such as 30s, 5m or 1h 30m";
    let duration = humantime::parse_duration(text).map_err(|_| wanted.to_string())?;
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Millis::span("", ms).map(|_| duration).map_err(|_| wanted.into())
}

/// For the API.
pub fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A number without a unit is one of bytes, if it is no less.
const BARE_MIN: bytesize::ByteSize = bytesize::ByteSize::mib(1);

pub fn memory(text: &str) -> Result<u64, String> {
    let wanted = format!(
        "must be 1 to {} bytes (16 TiB), such as 8GiB or 24000MB",
        limits::GPU_MEMORY_MAX_BYTES
    );
    match text.parse::<bytesize::ByteSize>() {
        // Who means 8 GiB would share a GPU with all others who do.
        Ok(size) if size < BARE_MIN && text.trim().parse::<u64>().is_ok_and(|bare| bare > 0) => {
            Err(format!("would be {text} bytes: name a unit, such as {text}GiB, or {text}B"))
        }
        Ok(size) if (1..=limits::GPU_MEMORY_MAX_BYTES).contains(&size.as_u64()) => {
            Ok(size.as_u64())
        }
        _ => Err(wanted),
    }
}

/// A size in bytes, from 0.
pub fn size(text: &str) -> Result<u64, String> {
    let size = text.parse::<bytesize::ByteSize>();
    size.map(|size| size.as_u64()).map_err(|_| "must be bytes, such as 256MiB or 1GB".into())
}

pub fn port(text: &str) -> Result<u32, String> {
    let number = text.parse::<u64>().ok().and_then(|n| Port::new("port", n).ok());
    number.map(|port| port.get().into()).ok_or_else(|| "must be 1 to 65535".into())
}

/// `[name=]P`, or `name=any`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    pub name: String,
    /// `None`: any one.
    pub number: Option<u32>,
}

pub fn named_port(text: &str) -> Result<NamedPort, String> {
    let (name, number) = match text.split_once('=') {
        Some((name, number)) => (self::name::<PortName>(name)?, number),
        None => (String::new(), text),
    };
    let number = match number {
        "any" if !name.is_empty() => None,
        number => Some(port(number).map_err(|e| format!("the port {e}, or NAME=any"))?),
    };
    Ok(NamedPort { name, number })
}

/// `A-B` or `A`, both ends included.
fn span(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!("must be rising: {first} is above {last}"));
    }
    Ok((first, last))
}

/// `P` or `P-Q`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpan(pub u32, pub u32);

pub fn port_span(text: &str) -> Result<PortSpan, String> {
    span(text).map(|(first, last)| PortSpan(first, last))
}

/// All ports of the spans, in rising order.
pub fn spread(spans: &[PortSpan]) -> Vec<u32> {
    spans.iter().flat_map(|s| s.0..=s.1).collect::<BTreeSet<_>>().into_iter().collect()
}

/// `name=first-last`.
pub fn range(text: &str) -> Result<v1::PortRange, String> {
    let (name, ports) =
        text.split_once('=').ok_or("must be name=first-last, such as service=40000-40063")?;
    let name = self::name::<RangeName>(name)?;
    let (first, last) = span(ports)?;
    Ok(v1::PortRange { name, first, last })
}

/// An allocation, as one knows it who holds it.
#[derive(Debug, clap::Args)]
pub struct Holder {
    /// Name of the instance
    #[arg(value_parser = name::<InstanceName>)]
    pub name: String,
    /// Token of the grant
    #[arg(long, allow_negative_numbers = true)]
    pub token: u64,
    /// Version that you know; 0: whatever it is
    #[arg(long, default_value_t = 0)]
    pub version: u64,
}

/// Of a lease or a member: 0 is none.
pub fn id() -> RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..)
}

pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be key=value")?;
    Ok((name::<LabelKey>(key)?, name::<LabelValue>(value)?))
}

/// Of a flag that may be repeated.
pub fn labels<T: FromIterator<(String, String)>>(
    given: Vec<(String, String)>,
) -> Result<T, CliError> {
    match given.iter().duplicates_by(|(key, _)| key).next() {
        Some((key, _)) => Err(CliError::Usage(format!("--label {key} is given twice"))),
        None => Ok(given.into_iter().collect()),
    }
}

pub fn host_port(text: &str) -> Result<String, String> {
    check_host_port("", text).map(|()| text.to_string()).map_err(limit)
}

/// `memory=24GiB[,model=M][,uuid=U][,index=I]`; without an index, its place in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuFlag {
    pub index: Option<u32>,
    pub uuid: String,
    pub model: String,
    pub memory_bytes: u64,
}

pub fn gpu(text: &str) -> Result<GpuFlag, String> {
    let mut flag =
        GpuFlag { index: None, uuid: String::new(), model: String::new(), memory_bytes: 0 };
    let mut given = BTreeSet::new();
    for part in text.split(',') {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} must be key=value, such as memory=24GiB"))?;
        if !given.insert(key) {
            return Err(format!("{key:?} is given twice"));
        }
        match key {
            "memory" => flag.memory_bytes = memory(value).map_err(|e| format!("memory {e}"))?,
            "model" => flag.model = value.into(),
            "uuid" => flag.uuid = value.into(),
            "index" => {
                let index = value.parse().ok().filter(|i| *i <= limits::GPU_INDEX_MAX);
                let wanted = format!("index must be 0 to {}", limits::GPU_INDEX_MAX);
                flag.index = Some(index.ok_or(wanted)?);
            }
            _ => return Err(format!("{key:?} must be one of memory, model, uuid, index")),
        }
    }
    if flag.memory_bytes == 0 {
        return Err("memory must be given, such as memory=24GiB".into());
    }
    Ok(flag)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_part_of_a_gpu_that_is_given_twice_is_refused_by_name() {
        let error = gpu("memory=1GiB,memory=2GiB").unwrap_err();
        assert_eq!(error, "\"memory\" is given twice");
    }

    #[test]
    fn a_label_that_is_given_twice_is_refused_by_name() {
        let label = |text: &str| label(text).unwrap();
        let given = vec![label("zone=a"), label("model=m"), label("zone=b")];
        let error = labels::<BTreeMap<_, _>>(given).unwrap_err().to_string();
        assert!(error.contains("--label zone is given twice"), "{error}");
    }
}
