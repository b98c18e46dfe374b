//! Says when host and table begin to differ, and when they no longer do. Once each: a difference
//! may last for days.

use std::collections::BTreeMap;

use tracing::{info, warn};

use crate::proto::v1;

/// What differs now: kind, name and port, with the words for it. Bounded by what a report holds.
#[derive(Default)]
pub struct Differences(BTreeMap<Key, String>);

type Key = (i32, String, u32);

impl Differences {
    pub fn tell(&mut self, drift: &[v1::Drift]) {
        let (begun, over) = self.take(drift);
        for (kind, name, port, detail) in begun {
            warn!(kind, name, port, "{detail}");
        }
        for (kind, name, port) in over {
            info!(kind, name, port, "no difference any more");
        }
    }

    /// What has begun, and what is over.
    fn take(&mut self, drift: &[v1::Drift]) -> (Vec<Begun>, Vec<Over>) {
        let now: BTreeMap<Key, String> =
            drift.iter().map(|d| ((d.kind, d.name.clone(), d.port), d.detail.clone())).collect();
        let Differences(before) = self;
        let begun = now.iter().filter(|(key, _)| !before.contains_key(key));
        let begun = begun
            .map(|((kind, name, port), detail)| (word(*kind), name.clone(), *port, detail.clone()));
        let over = before.keys().filter(|key| !now.contains_key(key));
        let over = over.map(|(kind, name, port)| (word(*kind), name.clone(), *port));
        let told = (begun.collect(), over.collect());
        self.0 = now;
        told
    }
}

type Begun = (&'static str, String, u32, String);
type Over = (&'static str, String, u32);

fn word(kind: i32) -> &'static str {
    v1::DriftKind::try_from(kind).unwrap_or_default().as_str_name()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_told_when_it_begins_and_when_it_is_over() {
        let drift = |port| v1::Drift {
            kind: v1::DriftKind::OpenButUnknown.into(),
            port,
            detail: "in use".into(),
            ..Default::default()
        };
        let kind = "OPEN_BUT_UNKNOWN";
        let begun = |port| (kind, String::new(), port, "in use".to_string());
        let mut differences = Differences::default();
        assert_eq!(differences.take(&[drift(1), drift(2)]), (vec![begun(1), begun(2)], vec![]));
        assert_eq!(differences.take(&[drift(1), drift(2)]), (vec![], vec![]));
        let over = (kind, String::new(), 1);
        assert_eq!(differences.take(&[drift(2), drift(3)]), (vec![begun(3)], vec![over]));
    }
}
