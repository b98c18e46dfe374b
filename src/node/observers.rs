//! Everyone who is told of each applied command, in one.

use std::sync::Arc;

use crate::core::{Applied, Checkpoint, Command, Event, State};
use crate::raft::{ApplyObserver, CommandAt};

pub(super) struct Observers(pub Vec<Arc<dyn ApplyObserver>>);

impl ApplyObserver for Observers {
    fn applied(&self, command: &Command, applied: &Applied, events: &[Event]) {
        self.0.iter().for_each(|observer| observer.applied(command, applied, events));
    }

    fn checkpoint(&self, at: CommandAt, checkpoint: &Checkpoint, state: &State) {
        self.0.iter().for_each(|observer| observer.checkpoint(at, checkpoint, state));
    }

    fn published(&self, state: &State) {
        self.0.iter().for_each(|observer| observer.published(state));
    }

    fn installed(&self, state: &State) {
        self.0.iter().for_each(|observer| observer.installed(state));
    }
}
