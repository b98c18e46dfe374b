//! `portwarden agent`: what runs on a worker beside its instances.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::worker::SpecFlags;
use super::{CliError, Globals, log_to_stderr, parse, stopped, usage};
use crate::agent::host::Linux;
use crate::agent::host::gpus::Driver;
use crate::agent::{Agent, AgentError, Told};
use crate::core::WorkerName;

const INTERVAL: Duration = Duration::from_secs(5);
const LOG_LEVEL: &str = "info";

#[derive(Debug, clap::Args)]
#[command(
    mut_arg("gpu", |arg| arg.help(
        "A GPU; may be repeated [default for a new worker: those that NVIDIA's driver shows]"
    )),
    after_help = "Examples:
  # A new worker
  portwarden agent --worker w1 --address 10.0.0.1 --range service=20000-20063 --label zone=a

  # One that `worker register` has made: it is adopted, and only what is named here is changed
  portwarden agent --worker w1 --endpoints 10.0.1.1:7601,10.0.1.2:7601,10.0.1.3:7601

  # The same from a file (worker = \"w1\", range = [\"service=20000-20063\"], …)
  portwarden agent --config agent.toml

It is to be run once in each network namespace that is a worker, as root, in the host's PID and cgroup
namespaces: what it cannot see it does not judge. It reports every interval which managed ports are in
use and whether instances live; the cluster frees, quarantines and gives ports by that. Without an
agent, what is on a lease is freed as soon as the lease ends.

SIGTERM or Ctrl-C ends it with exit code 0; its worker is lost until it is back, and keeps what it
holds. Exit code 3: the worker is not there, or was removed. Exit code 4: it is another machine's."
)]
pub struct Args {
    /// Name of the worker
    #[arg(long, value_parser = parse::name::<WorkerName>, required_unless_present = "config")]
    worker: Option<String>,
    /// From one report to the next (1s to 24h) [default: 5s]
    #[arg(long, value_name = "DURATION", value_parser = parse::span_of_time)]
    interval: Option<Duration>,
    #[command(flatten)]
    spec: SpecFlags,
    /// Take the GPUs that NVIDIA's driver shows, whatever the record has
    #[arg(long, conflicts_with = "gpu")]
    gpus_of_driver: bool,
    /// Take the worker over though its record is another machine's; refused while anything is held on it
    #[arg(long)]
    take_over: bool,
    /// error, warn, info, debug or trace, or a filter [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// A TOML file with worker, interval, address, range, reserve, gpu, label and log-level; a flag goes
    /// before it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The values are written as those of the flags are.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    worker: Option<String>,
    interval: Option<String>,
    address: Option<String>,
    range: Vec<String>,
    reserve: Vec<String>,
    gpu: Vec<String>,
    label: Vec<String>,
    log_level: Option<String>,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let (take_over, gpus_of_driver) = (args.take_over, args.gpus_of_driver);
    let settings = args.with_file()?;
    log_to_stderr(settings.log_level.as_deref().unwrap_or(LOG_LEVEL))?;
    let Some(worker) = settings.worker else {
        return Err(usage("--worker is required (see portwarden agent --help)"));
    };
    let fields = settings.spec.fields();
    let told = Told { spec: settings.spec.spec()?, fields, gpus_of_driver, take_over };
    let host = Arc::new(Linux::new(Box::new(Driver::default())));
    let interval = settings.interval.unwrap_or(INTERVAL);
    let agent = Agent::new(globals.client()?, host, worker, interval, told).map_err(reported)?;
    agent.run(stopped()?).await.map_err(reported)?;
    Ok(ExitCode::SUCCESS)
}

fn reported(error: AgentError) -> anyhow::Error {
    let text = error.to_string();
    match error {
        AgentError::Call(error) => error.into(),
        AgentError::NoIdentity(_) => anyhow::anyhow!(text),
        AgentError::NoSuchWorker { .. } | AgentError::Removed { .. } => {
            CliError::NotFound(text).into()
        }
        AgentError::OfAnotherMachine { .. } | AgentError::Taken { .. } => {
            CliError::Conflict(text).into()
        }
    }
}

/// Is it a `--config FILE`? For the fuzzers.
pub(super) fn parses(text: &str) -> bool {
    toml::from_str::<File>(text).is_ok()
}

struct Settings {
    worker: Option<String>,
    interval: Option<Duration>,
    spec: SpecFlags,
    log_level: Option<String>,
}

impl Args {
    fn with_file(self) -> anyhow::Result<Settings> {
        let file =
            self.config.as_deref().map(parse::config::<File>).transpose()?.unwrap_or_default();
        let flags = Settings {
            worker: self.worker,
            interval: self.interval,
            spec: self.spec,
            log_level: self.log_level,
        };
        let at = self.config.map(|path| path.display().to_string()).unwrap_or_default();
        file.under(flags).map_err(|why| usage(format!("--config: {at}: {why}")))
    }
}

impl File {
    /// What no flag says.
    fn under(self, flags: Settings) -> Result<Settings, String> {
        let worker = one("worker", self.worker, parse::name::<WorkerName>)?;
        let interval = one("interval", self.interval, parse::span_of_time)?;
        let spec = SpecFlags {
            address: flags.spec.address.or(self.address),
            range: or(flags.spec.range, all("range", self.range, parse::range)?),
            reserve: or(flags.spec.reserve, all("reserve", self.reserve, parse::port_span)?),
            gpu: or(flags.spec.gpu, all("gpu", self.gpu, parse::gpu)?),
            label: or(flags.spec.label, all("label", self.label, parse::label)?),
        };
        Ok(Settings {
            worker: flags.worker.or(worker),
            interval: flags.interval.or(interval),
            spec,
            log_level: flags.log_level.or(self.log_level),
        })
    }
}

type Parser<T> = fn(&str) -> Result<T, String>;

fn one<T>(key: &str, text: Option<String>, parse: Parser<T>) -> Result<Option<T>, String> {
    let parse = |text: String| parse(&text).map_err(|why| format!("{key}: {text:?} {why}"));
    text.map(parse).transpose()
}

fn all<T>(key: &str, texts: Vec<String>, parse: Parser<T>) -> Result<Vec<T>, String> {
    let parse = |text: String| parse(&text).map_err(|why| format!("{key}: {text:?} {why}"));
    texts.into_iter().map(parse).collect()
}

fn or<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
    if flags.is_empty() { file } else { flags }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Settings {
        Settings { worker: None, interval: None, spec: SpecFlags::default(), log_level: None }
    }

    fn under(text: &str, flags: Settings) -> Result<Settings, String> {
        toml::from_str::<File>(text).map_err(|e| e.to_string())?.under(flags)
    }

    #[test]
    fn a_flag_goes_before_the_file() {
        let text = "worker = \"w\"\ninterval = \"9s\"\nrange = [\"a=1-9\", \"b=10-19\"]\n\
                    label = [\"zone=a\"]\naddress = \"h\"\ngpu = [\"memory=8GiB\"]\n";
        let settings = under(text, flags()).unwrap();
        assert_eq!(settings.worker.as_deref(), Some("w"));
        assert_eq!(settings.interval, Some(Duration::from_secs(9)));
        assert_eq!(settings.spec.fields(), ["address", "labels", "ranges", "gpus"]);
        let range = parse::range("c=20-29").unwrap();
        let spec = SpecFlags { range: vec![range.clone()], ..SpecFlags::default() };
        let settings = under(text, Settings { spec, ..flags() }).unwrap();
        assert_eq!(settings.spec.spec().unwrap().ranges, [range]);
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, named) in [
            ("wroker = \"w\"", "wroker"),
            ("range = [\"a=9-1\"]", "range: \"a=9-1\" must be rising"),
            ("interval = \"1ms\"", "interval"),
            ("gpu = [\"memory=17TiB\"]", "16 TiB"),
            ("label = [\"k\"]", "key=value"),
        ] {
            let error = under(text, flags()).err().unwrap();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
