//! The names and numbers that the table is made of, each its own type, parsed once at the edge.

use std::fmt;

use smol_str::SmolStr;

use super::limits::*;

/// A value outside its limit. `limit` reads as the end of "must be …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} must be {limit}")]
pub struct Invalid {
    pub field: String,
    pub value: String,
    pub limit: String,
}

impl Invalid {
    /// `value` is cut to a length that fits an error message.
    pub fn new(
        field: impl Into<String>,
        value: impl fmt::Display,
        limit: impl Into<String>,
    ) -> Self {
        const SHOWN_CHARS: usize = 80;
        let full = value.to_string();
        let mut shown: String = full.chars().take(SHOWN_CHARS).collect();
        if shown.len() < full.len() {
            shown.push_str(&format!("… ({} bytes)", full.len()));
        }
        Invalid { field: field.into(), value: shown, limit: limit.into() }
    }

    /// The same error, with `outer.` before the field: `claims[2].ports[0].count`.
    pub fn within(mut self, outer: impl fmt::Display) -> Self {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

/// Checks a length in bytes.
pub fn check_text(field: &str, value: &str, max_bytes: usize) -> Result<(), Invalid> {
    if value.len() > max_bytes {
        return Err(Invalid::new(field, value, format!("at most {max_bytes} bytes")));
    }
    if let Some(c) = value.chars().find(|c| c.is_control()) {
        return Err(Invalid::new(
            field,
            value,
            format!("free of control characters (found {c:?})"),
        ));
    }
    Ok(())
}

fn check_name(
    field: &str,
    value: &str,
    max_bytes: usize,
    inner: &str,
    may_be_empty: bool,
) -> Result<(), Invalid> {
    let bytes = value.as_bytes();
    let ok = |byte: &u8| byte.is_ascii_alphanumeric() || inner.as_bytes().contains(byte);
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let well_formed = bytes.iter().all(ok) && edge(bytes.first()) && edge(bytes.last());
    let fits = bytes.len() <= max_bytes;
    if fits && (well_formed || (may_be_empty && value.is_empty())) {
        return Ok(());
    }
    let low = if may_be_empty { 0 } else { 1 };
    Err(Invalid::new(
        field,
        value,
        format!(
            "{low} to {max_bytes} characters of A-Z a-z 0-9 {}, beginning and ending with a letter or digit",
            inner.chars().map(String::from).collect::<Vec<_>>().join(" ")
        ),
    ))
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $field:literal, $max:expr, $inner:literal, $empty:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(SmolStr);

        impl $name {
            /// Parses a name; the error names the field, the value and the limit.
            pub fn parse(value: &str) -> Result<Self, Invalid> {
                check_name($field, value, $max, $inner, $empty)?;
                Ok($name(value.into()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// Sorts before every name: the start of a search.
            #[allow(dead_code)]
            pub(super) fn lowest() -> Self {
                $name(SmolStr::default())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.as_str(), f)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = Invalid;
            fn from_str(value: &str) -> Result<Self, Invalid> {
                Self::parse(value)
            }
        }
    };
}

name_type!(
    /// What a scheduler starts; unique in the cluster.
    InstanceName, "name", NAME_MAX_BYTES, "-._:/", false
);
name_type!(
    /// One network namespace of one machine.
    WorkerName, "worker", NAME_MAX_BYTES, "-._:/", false
);
name_type!(
    /// A named span of managed ports on a worker.
    RangeName, "range", SHORT_NAME_MAX_BYTES, "-_", false
);
name_type!(
    /// What an instance calls one of its ports; becomes part of an environment variable.
    PortName, "port name", SHORT_NAME_MAX_BYTES, "-_", false
);
name_type!(
    /// Chosen by the caller per start attempt; tells a retry from a rival.
    Uid, "uid", UID_MAX_BYTES, "-._:/", false
);
name_type!(
    /// A label's key.
    LabelKey, "label key", LABEL_KEY_MAX_BYTES, "-._/", false
);
name_type!(
    /// A label's value; may be empty.
    LabelValue, "label value", LABEL_VALUE_MAX_BYTES, "-._", true
);

/// Small bounded labels of a worker or a claim.
pub type Labels = std::collections::BTreeMap<LabelKey, LabelValue>;

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_type!(
    /// Counter of state changes: one changing command is one revision, never reused.
    Revision
);
number_type!(
    /// Fencing token: the revision of the grant, stable for the life of the allocation.
    Token
);
number_type!(
    /// A lease: the revision of its grant.
    LeaseId
);

/// Who leads, and so writes the log: no two leaders have both the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Leader {
    pub term: u64,
    pub node: u64,
}

impl fmt::Display for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} in term {}", self.node, self.term)
    }
}

/// A span of time in milliseconds, or a moment as Unix time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Millis(pub u64);

impl Millis {
    /// Checks that a span lies within the bounds that hold for all spans a caller may ask for.
    pub fn span(field: &str, ms: u64) -> Result<Self, Invalid> {
        if (SPAN_MIN_MS..=SPAN_MAX_MS).contains(&ms) {
            return Ok(Millis(ms));
        }
        Err(Invalid::new(field, Millis(ms), "1s to 24h"))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(std::time::Duration::from_millis(self.0)).fmt(f)
    }
}

/// A port number, 1 to 65535, held for TCP and UDP together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(u16);

impl Port {
    pub fn new(field: &str, number: u64) -> Result<Self, Invalid> {
        match u16::try_from(number) {
            Ok(number) if number != 0 => Ok(Port(number)),
            _ => Err(Invalid::new(field, number, "1 to 65535")),
        }
    }

    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_at_its_limit_is_accepted_and_one_more_is_refused() {
        assert!(InstanceName::parse(&"a".repeat(NAME_MAX_BYTES)).is_ok());
        let error = InstanceName::parse(&"a".repeat(NAME_MAX_BYTES + 1)).unwrap_err();
        assert_eq!(error.field, "name");
        assert!(error.limit.contains("253"), "{error}");
        assert!(error.value.len() < 120, "a long value is cut: {error}");
        assert!(RangeName::parse(&"r".repeat(SHORT_NAME_MAX_BYTES)).is_ok());
        assert!(RangeName::parse(&"r".repeat(SHORT_NAME_MAX_BYTES + 1)).is_err());
    }

    #[test]
    fn names_keep_to_their_alphabet() {
        for good in ["qwen2.5-0.5b", "a", "team/app:1", "A_b"] {
            assert!(InstanceName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a b", "ä", "a\n", "a\0b", "/a"] {
            assert!(InstanceName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(LabelValue::parse("").is_ok());
        assert!(LabelKey::parse("").is_err());
    }

    #[test]
    fn ports_end_where_tcp_ends() {
        assert!(Port::new("port", 1).is_ok());
        assert!(Port::new("port", 65535).is_ok());
        for bad in [0, 65536, u64::MAX] {
            let error = Port::new("port", bad).unwrap_err();
            assert_eq!((error.value, error.limit.as_str()), (bad.to_string(), "1 to 65535"));
        }
    }
}
