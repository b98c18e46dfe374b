//! Replicas prove that they agree.
//!
//! Now and then the leader puts a `Checkpoint::Take` in the log. Every replica that applies it takes
//! the digest of its table as it is there: of a clone, on a thread for blocking work, so that
//! `apply` does not wait. The leader then asks the voters for theirs, and puts the one that most
//! have in the log as `Checkpoint::Compare`; a replica that took another one at that place ends at
//! once, by name, and says what it had. So the odd one ends, be it the leader itself. Where there is
//! no majority for any digest in time, the leader's own counts, as it does for what it replicates.
//!
//! - Places are log positions, not revisions: a replica whose revision went astray is found too.
//! - A replica hashes one table at a time. A `Take` that comes meanwhile waits, and a later one
//!   takes its place: so a long replay costs no more digests than it has time for.
//! - A `Compare` waits for its digest. One of a table that this replica never had there, or skipped,
//!   says nothing and is counted as `unknown`.
//! - A replica that ends leaves a mark in its data directory, since nobody can look at it any more: from
//!   its next start until it agrees, `portwarden_replica_differed` is 1. The leader shows that one differs
//!   as well, unless it is that one; so it listens for a while to those that come after the majority.
//! - Nothing is taken while nothing changed, or while the table may not grow for want of space; and
//!   the leader rests ten times as long as its own digest took.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::Node;
use super::status::ASK_TIMEOUT;
use crate::blocking::{FreedAside, spawn_blocking};
use crate::core::{Applied, Checkpoint, Command, Digest, Event, Revision, State, digest};
use crate::lock::guard;
use crate::proto::peer;
use crate::raft::{ApplyObserver, CommandAt, NodeId};
use crate::store::exit_at_once;

/// Exit status of a replica that does not agree (`EX_SOFTWARE` of sysexits.h).
pub const DISAGREES_EXIT: i32 = 70;

/// Without enough entries for a checkpoint, one comes after this, if anything changed.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(250);
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the digests of the others; ten times as long as the leader's own took, if that
/// is more.
const GATHER_MAX: Duration = Duration::from_secs(30);
/// How long the leader listens for the others once it has a majority; as long as its own digest took,
/// if that is more.
const LISTEN_MAX: Duration = Duration::from_secs(3);
/// Longest wait for the mark of a replica that ends: its disk may hang.
const MARK_MAX: Duration = Duration::from_secs(1);
/// Least time for which a node shows that it differed. What it replays agrees with old comparisons at once.
const SHOWN_MIN: Duration = Duration::from_secs(600);
/// In the data directory: why the last process over it ended.
const MARK: &str = "differed";
/// Longest wait for the leader's own digest.
const DIGEST_MAX: Duration = Duration::from_secs(600);
const REST_FACTOR: u32 = 10;
/// Digests that are remembered for comparisons to come.
const TAKEN_KEPT: usize = 16;

/// A digest, and where in the log it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    pub at: CommandAt,
    pub revision: Revision,
    pub digest: Digest,
}

/// What a comparison came to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Agrees(Revision),
    Differs {
        own: Taken,
        theirs: Taken,
    },
    /// This replica has no digest of that place.
    Unknown,
    /// Its digest is still being taken.
    Later,
}

/// What a replica has taken and has to take; hashing itself is done elsewhere.
#[derive(Default)]
struct Books {
    hashing: Option<CommandAt>,
    next: Option<(CommandAt, State)>,
    /// Newest last.
    taken: VecDeque<Taken>,
    /// Comparisons with what is being taken.
    waiting: Vec<Taken>,
}

impl Books {
    /// Returns what to hash now.
    fn take(&mut self, at: CommandAt, state: &State) -> Option<(CommandAt, State)> {
        if self.hashing.is_none() {
            self.hashing = Some(at);
            return Some((at, state.clone()));
        }
        drop(FreedAside::from(self.next.replace((at, state.clone()))));
        None
    }

    fn hashed(&mut self, taken: Taken) -> (Vec<Verdict>, Option<(CommandAt, State)>) {
        self.taken.push_back(taken);
        if self.taken.len() > TAKEN_KEPT {
            self.taken.pop_front();
        }
        let next = self.next.take();
        self.hashing = next.as_ref().map(|(at, _)| *at);
        let waiting = std::mem::take(&mut self.waiting);
        let verdicts = waiting.into_iter().map(|theirs| self.compare(theirs)).collect();
        (verdicts, next)
    }

    fn compare(&mut self, theirs: Taken) -> Verdict {
        let next = self.next.as_ref().map(|(at, _)| *at);
        match self.taken.iter().rfind(|own| own.at == theirs.at) {
            Some(own) if *own == theirs => Verdict::Agrees(own.revision),
            Some(own) => Verdict::Differs { own: *own, theirs },
            None if self.hashing == Some(theirs.at) || next == Some(theirs.at) => {
                self.waiting.push(theirs);
                Verdict::Later
            }
            None => Verdict::Unknown,
        }
    }
}

/// One replica's part; an observer of `apply`.
#[derive(Clone)]
pub(super) struct Agreement(Arc<Shared>);

struct Shared {
    node: NodeId,
    books: Mutex<Books>,
    latest: watch::Sender<Option<Taken>>,
    mark: PathBuf,
    marked: AtomicBool,
    began: Instant,
}

impl Agreement {
    /// Blocks on the disk.
    pub fn new(node: NodeId, data_dir: &Path) -> Agreement {
        let (latest, _) = watch::channel(None);
        let mark = data_dir.join(MARK);
        let why = std::fs::read_to_string(&mark).ok();
        if let Some(why) = &why {
            tracing::warn!(
                why,
                "this node's table differed from the others' before it was started"
            );
        }
        let marked = AtomicBool::new(why.is_some());
        show_differed(node, why.is_some());
        let (books, began) = (Mutex::default(), Instant::now());
        Agreement(Arc::new(Shared { node, books, latest, mark, marked, began }))
    }

    /// The last digest that this node took.
    pub fn latest(&self) -> Option<Taken> {
        *self.0.latest.borrow()
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        guard(&self.0.books)
    }

    fn hash(&self, at: CommandAt, state: State) {
        let agreement = self.clone();
        spawn_blocking(move || {
            let began = Instant::now();
            let taken = Taken { at, revision: state.revision, digest: digest(&state) };
            histogram!("portwarden_digest_seconds").record(began.elapsed().as_secs_f64());
            drop(state);
            let (verdicts, next) = agreement.books().hashed(taken);
            agreement.0.latest.send_replace(Some(taken));
            verdicts.into_iter().for_each(|verdict| agreement.heed(verdict));
            if let Some((at, state)) = next {
                agreement.hash(at, state);
            }
        });
    }

    fn heed(&self, verdict: Verdict) {
        let count = |result| {
            counter!("portwarden_checkpoints_total", "result" => result).increment(1);
        };
        match verdict {
            Verdict::Agrees(revision) => {
                count("agrees");
                let node = self.0.node.to_string();
                gauge!("portwarden_checkpoint_revision", "node" => node).set(revision.0 as f64);
                self.unmark();
            }
            Verdict::Unknown => count("unknown"),
            Verdict::Later => {}
            Verdict::Differs { own, theirs } => self.disagree(&own, &theirs),
        }
    }

    /// What is wrong with this table nobody knows: nothing more may be said from it.
    fn disagree(&self, own: &Taken, theirs: &Taken) -> ! {
        let text = format!(
            "node {} does not agree with the cluster: at log entry {} its table has revision {} and \
             digest {}, the cluster's has revision {} and digest {}; the process ends. If it ends again \
             after a restart, remove this node and let it join on an empty data directory under a new \
             id; and report this: it is a bug, or broken memory",
            self.0.node, own.at.0, own.revision, own.digest, theirs.revision, theirs.digest
        );
        tracing::error!("{text}");
        leave_mark(&self.0.mark, &text);
        exit_at_once(DISAGREES_EXIT, &text)
    }

    fn unmark(&self) {
        let shown = self.0.began.elapsed() >= SHOWN_MIN;
        if shown && self.0.marked.swap(false, Ordering::Relaxed) {
            show_differed(self.0.node, false);
            let mark = self.0.mark.clone();
            // Where this fails, it is said once more at the next start.
            spawn_blocking(move || drop(std::fs::remove_file(mark)));
        }
    }
}

fn show_differed(node: NodeId, differed: bool) {
    gauge!("portwarden_replica_differed", "node" => node.to_string()).set(f64::from(differed));
}

/// Not on this thread, which answers nothing meanwhile: the process ends in time also where the disk takes
/// nothing.
fn leave_mark(mark: &Path, why: &str) {
    let (mark, why) = (mark.to_path_buf(), why.to_string());
    let (done, written) = mpsc::channel();
    spawn_blocking(move || {
        let _ = std::fs::write(mark, why);
        let _ = done.send(());
    });
    let _ = written.recv_timeout(MARK_MAX);
}

impl ApplyObserver for Agreement {
    fn applied(&self, _: &Command, _: &Applied, _: &[Event]) {}

    fn checkpoint(&self, at: CommandAt, checkpoint: &Checkpoint, state: &State) {
        match *checkpoint {
            Checkpoint::Take => {
                let now = self.books().take(at, state);
                if let Some((at, state)) = now {
                    self.hash(at, state);
                }
            }
            Checkpoint::Compare { entry, command, revision, digest } => {
                let verdict =
                    self.books().compare(Taken { at: (entry, command), revision, digest });
                self.heed(verdict);
            }
        }
    }
}

/// On the leader: checkpoints, every so many entries, or after a while.
pub(super) async fn lead(node: Node, every_entries: u64) {
    let mut last = Instant::now();
    let mut rest = Duration::ZERO;
    while node.runs() {
        sleep(LOOK_EVERY).await;
        if node.leads().is_none() || last.elapsed() < rest || node.refuses_growth().is_some() {
            continue;
        }
        let table = node.table();
        let latest = node.inner.agreement.latest();
        if latest.map_or(0, |taken| taken.revision.0) == table.state.revision.0 {
            continue;
        }
        let applied = table.applied.map_or(0, |at| at.index);
        let entries = applied.saturating_sub(latest.map_or(0, |taken| taken.at.0));
        if entries < every_entries && last.elapsed() < CHECKPOINT_EVERY {
            continue;
        }
        drop(table);
        match round(&node, latest.map(|taken| taken.at)).await {
            Ok(hashing) => rest = hashing * REST_FACTOR,
            Err(why) => tracing::info!(why, "a checkpoint was not made"),
        }
        last = Instant::now();
    }
}

/// One checkpoint, from its digests to the comparison; says how long this node's own digest took. A
/// leader that is deposed meanwhile fails.
async fn round(node: &Node, before: Option<CommandAt>) -> Result<Duration, String> {
    let propose = async |checkpoint| {
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        let done = node.propose(Command::Checkpoint(checkpoint), deadline).await;
        done.map_err(|error| error.to_string())
    };
    propose(Checkpoint::Take).await?;
    let began = Instant::now();
    let mut latest = node.inner.agreement.0.latest.subscribe();
    let newer = |taken: &Option<Taken>| taken.map(|taken| taken.at) > before;
    let own = match timeout(DIGEST_MAX, latest.wait_for(newer)).await {
        Ok(Ok(taken)) => taken.ok_or("no digest")?,
        _ => return Err("this node's own digest was not taken in time".into()),
    };
    let hashing = began.elapsed();
    let wait = GATHER_MAX.max(hashing * REST_FACTOR);
    let listen = LISTEN_MAX.max(hashing);
    let Taken { at: (entry, command), revision, digest } = gather(node, own, wait, listen).await;
    propose(Checkpoint::Compare { entry, command, revision, digest }).await?;
    Ok(hashing)
}

/// What most voters took at the place of `own`; `own` itself where nothing has a majority within `wait`.
/// With a majority it listens to the other voters for `listen`, so as to tell of one that differs.
async fn gather(node: &Node, own: Taken, wait: Duration, listen: Duration) -> Taken {
    let mut deadline = Instant::now() + wait;
    // Who has answered may be gone when the last one does.
    let mut votes = BTreeMap::from([(node.id(), own)]);
    loop {
        let membership = node.inner.metrics().membership_config;
        let voters: Vec<_> = membership.membership().voter_ids().collect();
        let answers = node.ask_others(ASK_TIMEOUT).await.into_iter();
        for (id, answer) in answers.filter(|(id, _)| voters.contains(id)) {
            let taken = answer.and_then(|answer| taken_of(&answer));
            votes.extend(taken.filter(|taken| taken.at == own.at).map(|taken| (id, taken)));
        }
        votes.retain(|id, _| *id == node.id() || voters.contains(id));
        let now = Instant::now();
        let most = majority(&votes, voters.len());
        if most.is_some() {
            deadline = deadline.min(now + listen);
        }
        let complete = voters.iter().all(|id| votes.contains_key(id));
        let late = now >= deadline;
        if let Some(most) = most.filter(|_| complete || late).or(late.then_some(own)) {
            for (id, odd) in votes.iter().filter(|(_, taken)| **taken != most) {
                counter!("portwarden_replicas_differ_total").increment(1);
                tracing::error!(
                    node = id, revision = %odd.revision, digest = %odd.digest,
                    cluster_revision = %most.revision, cluster_digest = %most.digest,
                    "a replica does not agree with the others"
                );
            }
            return most;
        }
        sleep(LOOK_EVERY).await;
    }
}

fn majority(votes: &BTreeMap<NodeId, Taken>, voters: usize) -> Option<Taken> {
    let count = |taken: &Taken| votes.values().filter(|other| *other == taken).count();
    votes.values().copied().find(|taken| count(taken) > voters / 2)
}

fn taken_of(answer: &peer::ProbeResponse) -> Option<Taken> {
    let peer::TakenDigest { entry, command, revision, digest } = answer.digest.as_ref()?;
    let digest = Digest(digest.as_ref().try_into().ok()?);
    Some(Taken { at: (*entry, *command), revision: Revision(*revision), digest })
}

/// As a probe tells it.
pub(super) fn wire_taken(taken: Taken) -> peer::TakenDigest {
    let Taken { at: (entry, command), revision, digest } = taken;
    peer::TakenDigest { entry, command, revision: revision.0, digest: digest.0.to_vec().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(revision: u64) -> State {
        crate::core::Restore::new(1, Revision(revision)).finish().unwrap()
    }

    fn taken(entry: u64, revision: u64) -> Taken {
        Taken { at: (entry, 0), revision: Revision(revision), digest: digest(&state(revision)) }
    }

    #[test]
    fn a_replica_compares_what_it_took_at_the_same_place() {
        let mut books = Books::default();
        assert!(books.take((10, 0), &state(5)).is_some());
        assert_eq!(books.compare(taken(10, 5)), Verdict::Later, "it is still being taken");
        assert_eq!(books.compare(taken(9, 5)), Verdict::Unknown, "never taken here");
        let (verdicts, next) = books.hashed(taken(10, 5));
        assert_eq!((verdicts, next), (vec![Verdict::Agrees(Revision(5))], None));
        // Another revision at the same place is found as surely as another digest.
        let theirs = taken(10, 6);
        assert_eq!(books.compare(theirs), Verdict::Differs { own: taken(10, 5), theirs });
        let theirs = Taken { digest: Digest([1; 32]), ..taken(10, 5) };
        assert_eq!(books.compare(theirs), Verdict::Differs { own: taken(10, 5), theirs });
    }

    #[test]
    fn takes_that_come_too_fast_are_skipped_and_their_comparisons_say_nothing() {
        let mut books = Books::default();
        assert!(books.take((10, 0), &state(5)).is_some());
        assert!(books.take((20, 0), &state(6)).is_none());
        assert_eq!(books.compare(taken(20, 6)), Verdict::Later);
        assert!(books.take((30, 0), &state(7)).is_none(), "takes the place of 20");
        assert_eq!(books.compare(taken(30, 8)), Verdict::Later);
        let (verdicts, next) = books.hashed(taken(10, 5));
        assert_eq!(verdicts, [Verdict::Unknown, Verdict::Later]);
        assert_eq!(next.map(|(at, _)| at), Some((30, 0)));
        let (verdicts, next) = books.hashed(taken(30, 7));
        let (own, theirs) = (taken(30, 7), taken(30, 8));
        assert_eq!((verdicts, next), (vec![Verdict::Differs { own, theirs }], None));
        assert!(books.take((40, 0), &state(9)).is_some(), "idle again");
    }

    #[test]
    fn most_voters_decide_and_no_two_of_four_do() {
        let (a, b) = (taken(10, 5), taken(10, 6));
        let most =
            |votes: &[(NodeId, Taken)], voters| majority(&votes.iter().copied().collect(), voters);
        assert_eq!(most(&[(1, b), (2, a), (3, a)], 3), Some(a), "the leader may be the odd one");
        assert_eq!(most(&[(1, a), (2, b)], 3), None);
        assert_eq!(most(&[(1, a), (2, a)], 3), Some(a), "without waiting for the third");
        assert_eq!(most(&[(1, a), (2, a)], 4), None);
        assert_eq!(most(&[(1, a)], 1), Some(a));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_differed_says_so_from_its_next_start_until_it_agrees() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        // A test of one thread: all of it is under this recorder.
        let _shown = metrics::set_default_local_recorder(&recorder);
        let differed = |shown: u32| {
            let line = format!("portwarden_replica_differed{{node=\"1\"}} {shown}");
            let all = recorder.handle().render();
            assert!(all.lines().any(|shown| shown == line), "{line} is not in {all}");
        };
        let dir = tempfile::tempdir().unwrap();
        let agreement = Agreement::new(1, dir.path());
        differed(0);
        leave_mark(&agreement.0.mark, "it ends");
        let agreement = Agreement::new(1, dir.path());
        differed(1);
        agreement.heed(Verdict::Agrees(Revision(5)));
        differed(1);
        tokio::time::advance(SHOWN_MIN).await;
        agreement.heed(Verdict::Unknown);
        differed(1);
        agreement.heed(Verdict::Agrees(Revision(6)));
        differed(0);
        while agreement.0.mark.exists() {
            sleep(Duration::from_millis(1)).await;
        }
        drop(Agreement::new(1, dir.path()));
        differed(0);
    }
}
