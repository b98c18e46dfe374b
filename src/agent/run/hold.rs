//! Holds an allocation while its program runs.
//!
//! In the steady state the keeper renews the lease, and nothing happens here. Where that fails:
//!
//! - *keep* (the worker has an agent): the allocation lingers and keeps its ports, so that the program
//!   goes on. As soon as the cluster is back, a new lease and a confirmation under the token revive
//!   it. Only where the cluster says that it is gone, or another's, must the program stop.
//! - *stop* (it has none): when the lease ends, the ports are given to others. The program is stopped
//!   before that, counted from when the last acknowledged keepalive was sent: asked when a third of
//!   the TTL is left, killed when a tenth is. So are those of a start that is not confirmed in time,
//!   counted from when they were asked for: the program is stopped before that, too.

use std::time::Duration;

use itertools::Itertools as _;
use tokio::time::{sleep, timeout};
use tonic::Code;
use tracing::{debug, info, warn};

use super::super::Trouble;
use super::numbers;
use crate::client::{Client, ClientError, Holding, Keeper, Standing};
use crate::proto::v1;

/// Before the cluster is asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// What is left when the program is asked to end, and when it is killed.
const ASK: Margin = Margin { part: 3, unconfirmed: Duration::from_secs(30) };
const KILL: Margin = Margin { part: 10, unconfirmed: Duration::from_secs(10) };
/// That part of the lease, and of the time for a confirmation too, but of this at most so much.
struct Margin {
    part: u32,
    unconfirmed: Duration,
}

/// Longest sleep: the keeper's clock may have jumped, as after a suspension.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLeaseLost {
    Keep,
    Stop,
}

/// Why a program must stop.
#[derive(Debug)]
pub enum Lost {
    /// The cluster has given away what it held, or is about to and cannot be asked.
    LeaseEnds,
    /// What it held is gone, or another's.
    Gone(String),
}

pub struct Hold {
    client: Client,
    keeper: Keeper,
    lease: Holding,
    on_lease_lost: OnLeaseLost,
    /// When its ports were asked for, by the keeper's clock: the time for its confirmation began later.
    asked: Duration,
    /// As it was last seen.
    pub held: v1::Allocation,
}

impl Hold {
    pub fn new(
        client: Client,
        keeper: Keeper,
        lease: Holding,
        on_lease_lost: OnLeaseLost,
        asked: Duration,
        held: v1::Allocation,
    ) -> Self {
        Hold { client, keeper, lease, on_lease_lost, asked, held }
    }

    /// From here on other ports are asked for.
    pub fn asks_anew(&mut self) {
        self.asked = self.keeper.now();
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    pub fn lease(&self) -> u64 {
        self.lease.id()
    }

    /// What is left of the lease at least.
    fn left(&self) -> Duration {
        match self.lease.standing() {
            Standing::Held { until } => until.saturating_sub(self.keeper.now()),
            Standing::Unproven | Standing::Gone => Duration::ZERO,
        }
    }

    /// Until a program that is killed then has surely ended before its ports are given to others.
    pub fn grace(&self) -> Duration {
        self.left_but(KILL)
    }

    /// For how long the program may go on before it must be asked to end.
    fn spare(&self) -> Duration {
        self.left_but(ASK)
    }

    /// Until no more than this is left.
    fn left_but(&self, Margin { part, unconfirmed }: Margin) -> Duration {
        if self.on_lease_lost == OnLeaseLost::Keep {
            return Duration::MAX;
        }
        let lease = self.left().saturating_sub(self.lease.ttl() / part);
        if self.held.phase() != v1::Phase::Reserved {
            return lease;
        }
        let within = Duration::from_millis(self.held.confirm_within_ms);
        let end = self.asked + within - unconfirmed.min(within / part);
        lease.min(end.saturating_sub(self.keeper.now()))
    }

    /// Must a program not be started any more?
    pub fn is_ending(&self) -> bool {
        self.spare().is_zero()
    }

    /// Resolves when it must be asked to end.
    pub async fn ending(&mut self) {
        loop {
            let spare = self.spare();
            if spare.is_zero() {
                return;
            }
            tokio::select! {
                _ = self.lease.changed() => {}
                () = sleep(spare.min(LOOK_EVERY)) => {}
            }
        }
    }

    /// Says that the program runs, under this handle; what lingers is revived by it. Tried until the
    /// cluster answers, for as long as the program may go on without.
    pub async fn confirm(&mut self, liveness: Option<v1::Liveness>) -> Result<(), Lost> {
        let mut trouble = Trouble::default();
        loop {
            let spare = self.spare();
            if spare.is_zero() {
                return Err(Lost::LeaseEnds);
            }
            let error = match timeout(spare, self.try_confirm(liveness.clone())).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => continue,
            };
            match error.code() {
                Some(Code::FailedPrecondition | Code::NotFound) => self.look(&error).await?,
                _ => trouble.say(&format!("not confirmed yet: {error}")),
            }
            sleep(PAUSE.min(self.spare())).await;
        }
    }

    async fn try_confirm(&mut self, liveness: Option<v1::Liveness>) -> Result<(), ClientError> {
        // One that ended meanwhile would be refused.
        if self.lease.standing() == Standing::Gone {
            self.lease = self.keeper.grant(self.lease.ttl()).await?;
        }
        let answer = self.client.confirm_with(v1::ConfirmRequest {
            name: self.held.name.clone(),
            token: self.held.token,
            version: self.held.version,
            liveness,
            lease: self.lease.id(),
        });
        self.held = answer.await?.allocation.unwrap_or_default();
        Ok(())
    }

    /// After a refusal: is it still there under the same uid, with the same ports? Then it has another
    /// version, or the lease has just ended.
    async fn look(&mut self, refused: &ClientError) -> Result<(), Lost> {
        match still_held(&self.client, &self.held).await {
            Ok(Ok(found)) => self.held = found,
            Ok(Err(lost)) => return Err(Lost::Gone(format!("{refused}; {lost}"))),
            Err(error) => debug!(%error, "the allocation cannot be looked up yet"),
        }
        Ok(())
    }

    /// Keeps it, until the program must stop.
    pub async fn kept(&mut self, liveness: Option<v1::Liveness>) -> Lost {
        if self.on_lease_lost == OnLeaseLost::Stop {
            self.ending().await;
            return Lost::LeaseEnds;
        }
        loop {
            match self.lease.changed().await {
                Standing::Held { .. } => continue,
                Standing::Unproven => {
                    let lease = self.lease.id();
                    warn!(lease, "not kept alive in time; the program goes on, its ports linger");
                    continue;
                }
                Standing::Gone => {}
            }
            warn!(lease = self.lease.id(), "the lease has ended; a new one is asked for");
            if let Err(lost) = self.confirm(liveness.clone()).await {
                return lost;
            }
            info!(lease = self.lease.id(), "the allocation is confirmed anew");
        }
    }

    /// Resolves when what it holds is no longer there under its uid, by an operator's word say, or has
    /// other ports than the program was given: the lease need not have ended. Asked as often as the lease is
    /// kept alive.
    pub fn gone(&self) -> impl Future<Output = Lost> + use<> {
        let (client, every, held) = (self.client.clone(), self.lease.ttl() / 3, self.held.clone());
        async move {
            loop {
                sleep(every).await;
                match still_held(&client, &held).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(lost)) => return Lost::Gone(lost),
                    Err(error) => debug!(%error, "whether it is still held is not known"),
                }
            }
        }
    }

    /// Gives back what is held: the program has ended.
    pub async fn release(self) {
        release(&self.client, &self.lease, &self.held).await;
    }
}

/// Gives back what is held. What cannot be given back now is reclaimed in time, by the end of the lease
/// and, where there is an agent, by what that sees.
pub async fn release(client: &Client, lease: &Holding, held: &v1::Allocation) {
    let mut released = client.release(&held.name, held.token).await;
    if let Err(refused) = &released
        && refused.code() == Some(Code::FailedPrecondition)
        && let Ok(Some(found)) = find(client, &held.name, &held.uid).await
    {
        released = client.release(&held.name, found.token).await;
    }
    match released {
        Ok(_) => debug!(name = held.name, "released"),
        Err(error) => {
            warn!(name = held.name, %error, "not released; it is reclaimed in time");
            return;
        }
    }
    if let Err(error) = client.lease_revoke(lease.id()).await {
        debug!(%error, "the lease is left to expire");
    }
}

/// What is held, as it is now; or why it is not any more. The program was given these ports: with others the
/// table would say that it listens where it does not.
async fn still_held(
    client: &Client,
    held: &v1::Allocation,
) -> Result<Result<v1::Allocation, String>, ClientError> {
    let name = &held.name;
    match find(client, name, &held.uid).await {
        Ok(Some(found)) if found.ports == held.ports => Ok(Ok(found)),
        Ok(Some(found)) => {
            let [had, has] = [held, &found].map(|of| numbers(of).into_iter().join(", "));
            Ok(Err(format!("{name} has ports {has} now, and its program was given ports {had}")))
        }
        Ok(None) => Ok(Err(format!("{name} is another's now"))),
        Err(error) if error.code() == Some(Code::NotFound) => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

/// The allocation of this name as it is now; `None`: it is another's. Its holder is told by the uid: in a
/// cluster that was begun from a backup it has another token.
async fn find(
    client: &Client,
    name: &str,
    uid: &str,
) -> Result<Option<v1::Allocation>, ClientError> {
    let found = client.get(name, None).await?.allocation.unwrap_or_default();
    Ok((found.uid == uid).then_some(found))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::agent::fake::{granted, node};
    use crate::api::fake::Fake;
    use crate::core;

    fn keeping(client: &Client, keeper: Keeper, lease: Holding, held: v1::Allocation) -> Hold {
        let asked = keeper.now();
        Hold::new(client.clone(), keeper, lease, OnLeaseLost::Keep, asked, held)
    }

    fn apply(fake: &Fake, command: core::Command) {
        let origin = core::Origin::default();
        core::apply(&mut fake.state.lock().unwrap(), &origin, &command).0.outcome.unwrap();
    }

    /// As a cluster that was begun from a backup does.
    #[tokio::test]
    async fn what_has_another_token_under_its_uid_is_still_held() {
        let (fake, client) = node().await;
        let (keeper, lease, held) = granted(&client, Duration::from_secs(3)).await;
        let mut hold = keeping(&client, keeper, lease, held.clone());
        hold.confirm(None).await.unwrap();
        hold.held.token = held.token + 1;
        let gone = hold.gone();
        tokio::pin!(gone);
        assert!(timeout(Duration::from_millis(1_500), &mut gone).await.is_err());
        hold.confirm(None).await.unwrap();
        assert_eq!(hold.held.token, held.token);
        apply(
            &fake,
            core::Command::Release {
                name: "b".parse().unwrap(),
                authority: core::Authority::Operator { reason: "test".into() },
            },
        );
        assert!(matches!(gone.await, Lost::Gone(_)));
    }

    /// As after a conflict that another reported, or in a cluster that was begun from a backup of before one.
    #[tokio::test]
    async fn a_program_whose_ports_were_swapped_under_it_is_not_confirmed_on_others() {
        let (_, client) = node().await;
        let (keeper, lease, held) = granted(&client, Duration::from_secs(3)).await;
        let mut hold = keeping(&client, keeper, lease, held.clone());
        hold.confirm(None).await.unwrap();
        let gone = hold.gone();
        let taken = held.ports[0].number;
        let version = hold.held.version;
        client.report_conflict("b", held.token, version, taken).await.unwrap();
        let Lost::Gone(why) = gone.await else { panic!("not the lease") };
        assert!(why.contains(&format!("was given ports {taken}")), "{why}");
        let Err(Lost::Gone(_)) = hold.confirm(None).await else { panic!("it was confirmed") };
        let found = client.get("b", None).await.unwrap().allocation.unwrap();
        assert_eq!(found.phase(), v1::Phase::Reserved);
    }

    #[tokio::test]
    async fn what_has_another_token_is_given_back_under_its_uid() {
        let (_, client) = node().await;
        let (keeper, lease, held) = granted(&client, Duration::from_secs(60)).await;
        let before = v1::Allocation { token: held.token + 1, ..held };
        keeping(&client, keeper, lease, before).release().await;
        let error = client.get("b", None).await.unwrap_err();
        assert_eq!(error.code(), Some(Code::NotFound), "{error}");
    }

    #[tokio::test]
    async fn nothing_is_started_on_a_lease_of_which_too_little_is_left() {
        let (_, client) = node().await;
        let (keeper, lease, held) = granted(&client, Duration::from_secs(3)).await;
        let id = lease.id();
        let mut hold = keeping(&client, keeper, lease, held);
        hold.on_lease_lost = OnLeaseLost::Stop;
        assert!(!hold.is_ending());
        client.lease_revoke(id).await.unwrap();
        hold.ending().await;
        assert!(hold.is_ending());
        hold.on_lease_lost = OnLeaseLost::Keep;
        assert!(!hold.is_ending(), "what an agent watches lingers");
    }

    /// Its ports are given to others then, however long its lease is.
    #[tokio::test]
    async fn a_program_is_stopped_where_it_is_not_confirmed_in_time() {
        let (_, client) = node().await;
        let (_, _, held) = granted(&client, Duration::from_secs(60)).await;
        let clock = Arc::new(AtomicU64::new(0));
        let shown = clock.clone();
        let seconds = Arc::new(move || Duration::from_secs(shown.load(Ordering::Relaxed)));
        let keeper = Keeper::start_with(client.clone(), seconds);
        let lease = keeper.grant(Duration::from_secs(86_400)).await.unwrap();
        let mut hold = keeping(&client, keeper, lease, held);
        hold.on_lease_lost = OnLeaseLost::Stop;
        assert_eq!(hold.held.confirm_within_ms, 600_000);
        clock.store(569, Ordering::Relaxed);
        assert_eq!([hold.spare(), hold.grace()], [1, 21].map(Duration::from_secs));
        clock.store(570, Ordering::Relaxed);
        hold.ending().await;
        assert!(hold.is_ending());
        assert!(matches!(hold.confirm(None).await, Err(Lost::LeaseEnds)));
        hold.asks_anew();
        assert!(!hold.is_ending(), "other ports have their own time");
        hold.confirm(None).await.unwrap();
        clock.store(6_000, Ordering::Relaxed);
        assert!(!hold.is_ending(), "it is confirmed");
    }

    #[tokio::test]
    async fn what_lingered_while_it_started_is_confirmed_on_its_lease() {
        let (fake, client) = node().await;
        let (keeper, lease, held) = granted(&client, Duration::from_secs(60)).await;
        let id = lease.id();
        apply(
            &fake,
            core::Command::Reclaim {
                name: held.name.parse().unwrap(),
                token: core::Token(held.token),
                version: core::Revision(held.version),
                ground: core::Ground::Unconfirmed,
                under: core::Leader::default(),
            },
        );
        let mut hold = keeping(&client, keeper, lease, held);
        hold.confirm(None).await.unwrap();
        let found = client.get("b", None).await.unwrap().allocation.unwrap();
        assert_eq!((found.phase(), found.lease), (v1::Phase::Bound, id));
    }
}
