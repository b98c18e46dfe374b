//! Version 1: the mirror structs, as bincode's standard configuration writes them (little endian,
//! variable-length integers; an enum's variant by its place). Fields and variants are never
//! reordered or removed here. A variant is added, at the end, only where nothing writes it before all
//! members can read it. Texts borrow from what is written or read.

mod claim;
mod command;
mod log;
mod snapshot;
mod worker;

pub use log::{Ballot, Commands, Payload, Position};
pub use snapshot::{
    Progress, Record, SnapshotHead, records_after, records_before, records_of, take_record,
};

use crate::core::{Invalid, LeaseId, Port};

/// Why something that was read is not what it should be.
#[derive(Debug)]
pub struct Why(String);

impl From<Why> for String {
    fn from(why: Why) -> String {
        why.0
    }
}

impl From<Invalid> for Why {
    fn from(invalid: Invalid) -> Why {
        Why(invalid.to_string())
    }
}

impl From<String> for Why {
    fn from(why: String) -> Why {
        Why(why)
    }
}

type Checked<T> = Result<T, Why>;

/// Without room for more: most of them are kept for as long as what they are part of.
fn each<T, U>(
    items: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
    mut one: impl FnMut(T) -> Checked<U>,
) -> Checked<Vec<U>> {
    let items = items.into_iter();
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        all.push(one(item)?);
    }
    Ok(all)
}

fn optional<T, U>(item: Option<T>, one: impl FnOnce(T) -> Checked<U>) -> Checked<Option<U>> {
    item.map(one).transpose()
}

fn lease(id: &Option<LeaseId>) -> Option<u64> {
    id.map(|id| id.0)
}

fn port(number: u16) -> Checked<Port> {
    Ok(Port::new("port", u64::from(number))?)
}
