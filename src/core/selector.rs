//! Selectors: which workers a claim may be placed on, by their labels.
//!
//! The grammar is that of Kubernetes' label selectors
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>):
//! `k=v`, `k==v`, `k!=v`, `k in (a,b)`, `k notin (a,b)`, `k` (exists), `!k`; joined by commas,
//! all must hold. As there, `!=` and `notin` also match where the key is absent.

use std::collections::BTreeSet;
use std::fmt;

use winnow::ascii::multispace0;
use winnow::combinator::{alt, delimited, opt, preceded, separated, terminated};
use winnow::prelude::*;
use winnow::token::take_while;

use super::limits::*;
use super::name::{Invalid, LabelKey, LabelValue, Labels};

/// One condition on one label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Term {
    /// The key is there with one of these values (`=`, `in`).
    In(LabelKey, BTreeSet<LabelValue>),
    /// The key is absent, or has none of these values (`!=`, `notin`).
    NotIn(LabelKey, BTreeSet<LabelValue>),
    Exists(LabelKey),
    Absent(LabelKey),
}

impl Term {
    pub fn matches(&self, labels: &Labels) -> bool {
        match self {
            Term::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Term::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Term::Exists(key) => labels.contains_key(key),
            Term::Absent(key) => !labels.contains_key(key),
        }
    }
}

/// All terms must hold; without terms every worker matches. Comes only from [`Selector::parse`]
/// and [`Selector::new`], so that its limits hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Selector {
    pub(super) terms: Vec<Term>,
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.terms.iter().all(|term| term.matches(labels))
    }

    pub fn new(terms: Vec<Term>) -> Result<Self, Invalid> {
        if terms.len() > SELECTOR_TERMS_MAX {
            let limit = format!("at most {SELECTOR_TERMS_MAX} terms");
            return Err(Invalid::new("selector", terms.len(), limit));
        }
        Ok(Selector { terms })
    }

    pub fn terms(&self) -> &[Term] {
        &self.terms
    }

    /// Parses the text form. The error's field is `selector`.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let invalid = |limit: String| Invalid::new("selector", text, limit);
        if text.len() > SELECTOR_MAX_BYTES {
            return Err(invalid(format!("at most {SELECTOR_MAX_BYTES} bytes")));
        }
        if text.trim().is_empty() {
            return Ok(Selector::default());
        }
        let raw = terms.parse(text).map_err(|e| {
            invalid(format!(
                "like `k=v,k!=v,k in (a,b),k notin (a,b),k,!k` (stopped at byte {})",
                e.offset()
            ))
        })?;
        if raw.len() > SELECTOR_TERMS_MAX {
            return Err(invalid(format!("at most {SELECTOR_TERMS_MAX} terms")));
        }
        let terms = raw
            .into_iter()
            .map(RawTerm::check)
            .collect::<Result<_, _>>()
            .map_err(|e| e.within("selector"))?;
        Ok(Selector { terms })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, term) in self.terms.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{term}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &BTreeSet<LabelValue>| {
            values.iter().map(LabelValue::as_str).collect::<Vec<_>>().join(",")
        };
        match self {
            Term::In(key, values) if values.len() == 1 => write!(f, "{key}={}", list(values)),
            Term::In(key, values) => write!(f, "{key} in ({})", list(values)),
            Term::NotIn(key, values) if values.len() == 1 => write!(f, "{key}!={}", list(values)),
            Term::NotIn(key, values) => write!(f, "{key} notin ({})", list(values)),
            Term::Exists(key) => write!(f, "{key}"),
            Term::Absent(key) => write!(f, "!{key}"),
        }
    }
}

#[derive(Clone, Copy)]
enum Sense {
    In,
    NotIn,
    Exists,
    Absent,
}

struct RawTerm<'a> {
    key: &'a str,
    sense: Sense,
    values: Vec<&'a str>,
}

impl RawTerm<'_> {
    fn check(self) -> Result<Term, Invalid> {
        let key = LabelKey::parse(self.key)?;
        if self.values.len() > SELECTOR_VALUES_MAX {
            return Err(Invalid::new(
                key.as_str(),
                self.values.len(),
                format!("at most {SELECTOR_VALUES_MAX} values"),
            ));
        }
        let values = self.values.into_iter().map(LabelValue::parse).collect::<Result<_, _>>()?;
        Ok(match self.sense {
            Sense::In => Term::In(key, values),
            Sense::NotIn => Term::NotIn(key, values),
            Sense::Exists => Term::Exists(key),
            Sense::Absent => Term::Absent(key),
        })
    }
}

fn word<'a>(input: &mut &'a str) -> ModalResult<&'a str> {
    take_while(1.., |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c)).parse_next(input)
}

fn value<'a>(input: &mut &'a str) -> ModalResult<&'a str> {
    opt(word).map(|v| v.unwrap_or("")).parse_next(input)
}

fn spaced<'a, O>(
    inner: impl ModalParser<&'a str, O, winnow::error::ContextError>,
) -> impl ModalParser<&'a str, O, winnow::error::ContextError> {
    delimited(multispace0, inner, multispace0)
}

fn values<'a>(input: &mut &'a str) -> ModalResult<Vec<&'a str>> {
    delimited("(", separated(1.., spaced(value), ","), ")").parse_next(input)
}

fn condition<'a>(input: &mut &'a str) -> ModalResult<(Sense, Vec<&'a str>)> {
    let set = |sense: Sense| move |list: Vec<&'a str>| (sense, list);
    let one = |sense: Sense| move |v: &'a str| (sense, vec![v]);
    alt((
        preceded((terminated("notin", multispace0),), values).map(set(Sense::NotIn)),
        preceded((terminated("in", multispace0),), values).map(set(Sense::In)),
        preceded(("!=", multispace0), value).map(one(Sense::NotIn)),
        preceded(("==", multispace0), value).map(one(Sense::In)),
        preceded(("=", multispace0), value).map(one(Sense::In)),
    ))
    .parse_next(input)
}

fn term<'a>(input: &mut &'a str) -> ModalResult<RawTerm<'a>> {
    if let Some(key) = opt(preceded(("!", multispace0), word)).parse_next(input)? {
        return Ok(RawTerm { key, sense: Sense::Absent, values: vec![] });
    }
    let key = word.parse_next(input)?;
    let condition = opt(preceded(multispace0, condition)).parse_next(input)?;
    let (sense, values) = condition.unwrap_or((Sense::Exists, vec![]));
    Ok(RawTerm { key, sense, values })
}

fn terms<'a>(input: &mut &'a str) -> ModalResult<Vec<RawTerm<'a>>> {
    separated(1.., spaced(term), ",").parse_next(input)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| (LabelKey::parse(k).unwrap(), LabelValue::parse(v).unwrap()))
            .collect()
    }

    #[test]
    fn every_form_parses_matches_and_prints_back() {
        let worker = labels(&[("zone", "a"), ("gpu", "4090"), ("empty", "")]);
        for (text, matches, printed) in [
            ("", true, ""),
            ("zone=a", true, "zone=a"),
            ("zone == a", true, "zone=a"),
            ("zone=b", false, "zone=b"),
            ("zone!=b", true, "zone!=b"),
            ("nope!=b", true, "nope!=b"),
            ("zone in (a, b)", true, "zone in (a,b)"),
            ("zone in (b,c)", false, "zone in (b,c)"),
            ("zone notin (b,c)", true, "zone notin (b,c)"),
            ("gpu", true, "gpu"),
            ("!gpu", false, "!gpu"),
            ("!nope", true, "!nope"),
            ("empty=", true, "empty="),
            (" zone=a , gpu = 4090 ", true, "zone=a,gpu=4090"),
            ("inner=1", false, "inner=1"),
        ] {
            let selector = Selector::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(selector.matches(&worker), matches, "{text}");
            assert_eq!(selector.to_string(), printed);
            assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector);
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_place() {
        for bad in ["=", "zone=a,", "zone in ()x", "zone in (a", "a b", "zone=a=b", "ä=1", "-a=1"]
        {
            let error = Selector::parse(bad).unwrap_err();
            assert!(error.field.starts_with("selector"), "{bad}: {error}");
        }
        let long = vec!["a=b"; SELECTOR_TERMS_MAX + 1].join(",");
        assert!(Selector::parse(&long).is_err());
        assert!(Selector::parse(&vec!["a=b"; SELECTOR_TERMS_MAX].join(",")).is_ok());
        assert!(Selector::parse(&"a".repeat(SELECTOR_MAX_BYTES + 1)).is_err());
    }
}
