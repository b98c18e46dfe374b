//! Where the cluster is reached: what the client was given, and what it has learnt since.
//!
//! A client that lives on asks now and then for the members, in passing, and goes to those first: it
//! finds nodes that were added and leaves those that were removed. What it was given stays as the last
//! resort: it may be a name that stands for others.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::Channel;

use super::ClientError;

/// One endpoint and the way to it.
#[derive(Debug)]
pub(super) struct Door {
    pub name: String,
    pub channel: Channel,
}

/// Makes the way to an endpoint that was learnt.
pub(super) type Connect = fn(&str) -> Result<Channel, ClientError>;

pub(super) struct Endpoints {
    given: Vec<Arc<Door>>,
    /// `None`: nothing is learnt.
    connect: Option<Connect>,
    learn_every: Duration,
    known: RwLock<Known>,
}

struct Known {
    /// Members first, then what was given besides.
    doors: Vec<Arc<Door>>,
    /// Name of the one that last answered.
    preferred: String,
    asked: Instant,
}

impl Endpoints {
    /// `given` is not empty.
    pub fn new(
        given: Vec<(String, Channel)>,
        connect: Option<Connect>,
        learn_every: Duration,
    ) -> Endpoints {
        let given: Vec<_> =
            given.into_iter().map(|(name, channel)| Arc::new(Door { name, channel })).collect();
        let preferred = given.first().map(|door| door.name.clone()).unwrap_or_default();
        let known = Known { doors: given.clone(), preferred, asked: Instant::now() };
        Endpoints { given, connect, learn_every, known: RwLock::new(known) }
    }

    /// All there are, beginning with the one that last answered.
    pub fn doors(&self) -> Vec<Arc<Door>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let mut doors = known.doors.clone();
        let first = doors.iter().position(|door| door.name == known.preferred).unwrap_or(0);
        doors.rotate_left(first);
        doors
    }

    pub fn preferred(&self) -> String {
        self.known.read().unwrap_or_else(PoisonError::into_inner).preferred.clone()
    }

    pub fn prefer(&self, door: &Door) {
        if self.preferred() != door.name {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            known.preferred.clone_from(&door.name);
        }
    }

    /// Is it time to ask for the members? Says so to one caller.
    pub fn is_due(&self) -> bool {
        let due =
            |known: &Known| self.connect.is_some() && known.asked.elapsed() >= self.learn_every;
        if !due(&self.known.read().unwrap_or_else(PoisonError::into_inner)) {
            return false;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let due = due(&known);
        if due {
            known.asked = Instant::now();
        }
        due
    }

    /// These are the members' now. Connections to those that stay are kept.
    pub fn learn(&self, members: &[String]) {
        let Some(connect) = self.connect else { return };
        if members.is_empty() {
            return;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let door = |name: &String| {
            let all = known.doors.iter().chain(&self.given);
            let held = all.into_iter().find(|door| door.name == *name).cloned();
            held.or_else(|| {
                Some(Arc::new(Door { name: name.clone(), channel: connect(name).ok()? }))
            })
        };
        let mut doors: Vec<_> = members.iter().filter_map(door).collect();
        let named: BTreeSet<_> = members.iter().collect();
        doors.extend(self.given.iter().filter(|door| !named.contains(&door.name)).cloned());
        known.doors = doors;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Client;
    use super::*;

    const LEARN_EVERY: Duration = Duration::from_secs(10);

    fn connect(name: &str) -> Result<Channel, ClientError> {
        Ok(Client::endpoint(name)?.connect_lazy())
    }

    fn names(endpoints: &Endpoints) -> Vec<String> {
        endpoints.doors().iter().map(|door| door.name.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn members_come_first_and_what_was_given_stays_the_last_resort() {
        let given = ["a:1", "b:1"].map(|name| (name.to_string(), connect(name).unwrap()));
        let endpoints = Endpoints::new(given.to_vec(), Some(connect), LEARN_EVERY);
        assert_eq!(names(&endpoints), ["a:1", "b:1"]);
        endpoints.prefer(&endpoints.doors()[1]);
        assert_eq!(names(&endpoints), ["b:1", "a:1"]);

        endpoints.learn(&["b:1".into(), "c:1".into()]);
        assert_eq!(names(&endpoints), ["b:1", "c:1", "a:1"]);
        endpoints.learn(&["d:1".into()]);
        assert_eq!(
            names(&endpoints),
            ["b:1", "d:1", "a:1"],
            "the one that answered is still first"
        );
        endpoints.learn(&[]);
        assert_eq!(names(&endpoints).len(), 3, "an empty answer teaches nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn the_members_are_asked_for_now_and_then_by_one_caller() {
        let given = vec![("a:1".to_string(), connect("a:1").unwrap())];
        let endpoints = Endpoints::new(given.clone(), Some(connect), LEARN_EVERY);
        assert!(!endpoints.is_due());
        tokio::time::advance(LEARN_EVERY).await;
        assert!(endpoints.is_due());
        assert!(!endpoints.is_due());
        let fixed = Endpoints::new(given, None, LEARN_EVERY);
        tokio::time::advance(LEARN_EVERY).await;
        assert!(!fixed.is_due());
    }
}
