//! Listings over several calls at one revision.
//!
//! The first page is taken from a fresh view; while there is more, the view is kept here under its
//! revision and later pages come from it. At most [`VIEWS_MAX`] views are kept, each until
//! [`VIEW_IDLE_MAX`] after its last use, or [`VIEW_ENDED_MAX`] after a last page; one that is gone
//! answers ABORTED, and the caller starts over. A view keeps what changed since from being freed, so
//! it goes then, whether anybody lists or not.
//!
//! A page ends at its size, at [`PAGE_SOFT_BYTES`] or after [`SCAN_MAX`] items looked at, whichever
//! is first, so that a call costs O(page) whatever its filters let through.

use std::collections::VecDeque;
use std::mem;
use std::time::Duration;

use prost::Message;
use tokio::time::Instant;
use tonic::Status;

use super::errors;
use crate::blocking::FreedAside;
use crate::core::{Invalid, Revision, State};

pub const PAGE_SIZE_DEFAULT: u32 = 1000;
pub const PAGE_SIZE_MAX: u32 = 10_000;
/// A page is closed once it is this large; one item is at most ~1.6 MiB, an answer 4 MiB.
pub const PAGE_SOFT_BYTES: usize = 2 << 20;
pub const SCAN_MAX: usize = 20_000;
pub const VIEWS_MAX: usize = 64;
pub const VIEW_IDLE_MAX: Duration = Duration::from_secs(120);
/// For whoever asks for the last page again.
pub const VIEW_ENDED_MAX: Duration = Duration::from_secs(10);
/// How often views go whose time is over.
pub const VIEWS_EXPIRE_EVERY: Duration = Duration::from_secs(5);

/// Views of listings that go on: those that ended first, then most recently used last.
#[derive(Default)]
pub struct Views {
    kept: VecDeque<Kept>,
    /// Somebody calls [`Views::expire`] now and then.
    watched: bool,
}

struct Kept {
    view: State,
    until: Instant,
}

impl Kept {
    fn new(view: State, time: Duration) -> Kept {
        Kept { view, until: Instant::now() + time }
    }
}

impl Views {
    /// True where [`Views::expire`] is to be called from now on.
    #[must_use]
    pub fn keep(&mut self, view: &State) -> bool {
        // Another listing may have ended at the same revision.
        let known = self.position(view.revision).and_then(|at| self.kept.remove(at));
        if known.is_none() && self.kept.len() == VIEWS_MAX {
            drop(FreedAside::from(self.kept.pop_front()));
        }
        self.kept.push_back(Kept::new(view.clone(), VIEW_IDLE_MAX));
        !mem::replace(&mut self.watched, true)
    }

    pub fn find(&mut self, revision: Revision) -> Option<State> {
        let Kept { view, .. } = self.kept.remove(self.position(revision)?)?;
        self.kept.push_back(Kept::new(view.clone(), VIEW_IDLE_MAX));
        Some(view)
    }

    /// A listing had its last page. Another one at the same revision may go on.
    pub fn end(&mut self, revision: Revision) {
        let ended = self.position(revision).and_then(|at| self.kept.remove(at));
        if let Some(Kept { view, .. }) = ended {
            self.kept.push_front(Kept::new(view, VIEW_ENDED_MAX));
        }
    }

    fn position(&self, revision: Revision) -> Option<usize> {
        self.kept.iter().position(|kept| kept.view.revision == revision)
    }

    /// Lets those go whose time is over. True where there are others, and it is to be called again.
    pub fn expire(&mut self) -> bool {
        let now = Instant::now();
        let over: VecDeque<_>;
        (self.kept, over) = mem::take(&mut self.kept).into_iter().partition(|k| k.until > now);
        drop(FreedAside::from(over));
        self.watched = !self.kept.is_empty();
        self.watched
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.kept.len()
    }
}

/// Where a listing goes on. Opaque to callers: `revision.name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageToken {
    pub revision: Revision,
    /// The last name that was looked at.
    pub after: String,
}

impl PageToken {
    /// `None` for the empty text: a first page.
    pub fn parse(text: &str) -> Result<Option<Self>, Status> {
        if text.is_empty() {
            return Ok(None);
        }
        let parsed = text.split_once('.').and_then(|(revision, after)| {
            Some(PageToken { revision: Revision(revision.parse().ok()?), after: after.into() })
        });
        let token = parsed.ok_or_else(|| {
            errors::invalid(Invalid::new("page_token", text, "the one of the last answer"))
        })?;
        Ok(Some(token))
    }

    /// Where the listing goes on.
    pub fn place<T, E>(&self, parse: impl FnOnce(&str) -> Result<T, E>) -> Result<T, Status> {
        let malformed = || Invalid::new("page_token", &self.after, "a token of this listing");
        parse(&self.after).map_err(|_| errors::invalid(malformed()))
    }

    pub fn text(&self) -> String {
        format!("{}.{}", self.revision, self.after)
    }
}

pub fn page_size(asked: u32) -> Result<usize, Status> {
    match asked {
        0 => Ok(PAGE_SIZE_DEFAULT as usize),
        1..=PAGE_SIZE_MAX => Ok(asked as usize),
        _ => {
            let limit = format!("1 to {PAGE_SIZE_MAX}, or 0 for {PAGE_SIZE_DEFAULT}");
            Err(errors::invalid(Invalid::new("page_size", asked, limit)))
        }
    }
}

pub struct Page<T> {
    pub items: Vec<T>,
    /// The last name looked at, where there is more.
    pub after: Option<String>,
}

/// Fills one page from `source`, whose items have a name and pass the filters if they have a value.
pub fn fill<'a, T: Message>(
    source: impl Iterator<Item = (&'a str, Option<T>)>,
    size: usize,
) -> Page<T> {
    let mut page = Page { items: Vec::new(), after: None };
    let (mut bytes, mut scanned) = (0, 0);
    let mut last = None;
    for (name, item) in source {
        if page.items.len() == size || bytes >= PAGE_SOFT_BYTES || scanned == SCAN_MAX {
            page.after = last.map(str::to_string);
            return page;
        }
        scanned += 1;
        last = Some(name);
        if let Some(item) = item {
            bytes += item.encoded_len();
            page.items.push(item);
        }
    }
    page
}
