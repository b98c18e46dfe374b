//! Decides whether a history is one that the cluster may have.
//!
//! Each rule is a module of its own and looks at the whole history:
//!
//! | rule | module | what must hold |
//! |---|---|---|
//! | holding | [`holding`] | no port, GPU byte or exclusive GPU is held by two at once |
//! | linear | [`replay`] | all answers are those of the core, in an order that real time allows |
//! | growth | [`growth`] | revisions and tokens only grow; no (name, token) names two grants |
//! | whole | [`whole`] | what is granted is all that was asked for |
//! | survival | [`survival`] | what was acknowledged stays, what was released is gone, a lease that was renewed lives |
//! | watches | [`watches`] | no stream has a gap or tells anything twice; all agree, and with the table |
//! | replicas | [`replicas`] | the nodes' own copies are equal at equal revisions |
//! | healing | [`healing`] | once nothing is done to it, all is available in time, and nothing is leaked |
//!
//! `linear` subsumes much of the others where the history is complete; the others need less: no
//! beginning, no revisions, no model. So a bug in the model or in the replay hides from one of them
//! only.

mod growth;
mod healing;
mod holding;
mod known;
mod replay;
mod replicas;
mod survival;
#[cfg(test)]
mod tests;
mod watches;
mod whole;

use std::fmt;

use crate::history::{End, History};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Holding,
    Linear,
    Growth,
    Whole,
    Survival,
    Watches,
    Replicas,
    Healing,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)
    }
}

/// What came of a check.
#[derive(Debug, Default)]
pub struct Report {
    pub violations: Vec<Violation>,
    /// What could not be decided, and why; and what was looked at.
    pub notes: Vec<String>,
    pub ok: usize,
    pub refused: usize,
    pub unknown: usize,
    pub failed: usize,
}

/// Violations of one rule that are shown: one bug often shows at a thousand places.
const SHOWN_MAX: usize = 20;

pub fn check(history: &History) -> Report {
    let mut report = Report::default();
    for op in &history.ops {
        *match op.end {
            End::Ok(_) => &mut report.ok,
            End::Refused { .. } => &mut report.refused,
            End::Unknown => &mut report.unknown,
            End::Fail => &mut report.failed,
        } += 1;
    }
    for (rule, broken) in [
        (Rule::Holding, holding::check(history)),
        (Rule::Growth, growth::check(history)),
        (Rule::Whole, whole::check(history)),
        (Rule::Survival, survival::check(history)),
        (Rule::Watches, watches::check(history)),
        (Rule::Replicas, replicas::check(history)),
        (Rule::Healing, healing::check(history)),
    ] {
        report.add(rule, broken);
    }
    let (broken, note) = replay::check(history);
    report.add(Rule::Linear, broken);
    report.notes.push(note);
    report
}

impl Report {
    fn add(&mut self, rule: Rule, mut broken: Vec<String>) {
        if broken.len() > SHOWN_MAX {
            self.notes.push(format!("{rule:?}: {} more are not shown", broken.len() - SHOWN_MAX));
            broken.truncate(SHOWN_MAX);
        }
        self.violations.extend(broken.into_iter().map(|what| Violation { rule, what }));
    }
}
