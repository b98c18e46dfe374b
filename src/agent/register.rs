//! How an agent makes a worker its own.
//!
//! A worker that is not in the table is registered, with what the agent was told and what the host
//! shows. One that is registered already is adopted: it gets the agent's identity, and of the rest
//! only what the agent was told by name. After a boot that is the same step; the boot is named first, and
//! what the rest has no place for is no reason to end: the agent's samples are what frees it.
//!
//! Two agents must not take turns with one record. A record that another machine has named its own
//! is left alone, unless the agent is told to take it over.

use std::sync::Arc;

use tonic::Code;
use tracing::{info, warn};

use super::AgentError;
use super::host::Host;
use crate::blocking::spawn_blocking;
use crate::client::{Client, ClientError, Refused};
use crate::proto::{precondition, reason, v1};

/// What the agent was told of its worker.
#[derive(Debug, Clone, Default)]
pub struct Told {
    pub spec: v1::WorkerSpec,
    /// Fields of `spec` that were named.
    pub fields: Vec<String>,
    /// The GPUs are to be those that the driver shows, whatever the record has.
    pub gpus_of_driver: bool,
    /// Take a record over that is another machine's.
    pub take_over: bool,
}

pub const IDENTITY: &str = "identity";
const GPUS: &str = "gpus";

/// What is to be done about a record.
#[derive(Debug, PartialEq)]
pub enum Step {
    Register(v1::WorkerSpec),
    Update {
        spec: v1::WorkerSpec,
        fields: Vec<String>,
    },
    /// It has all that already.
    Nothing,
}

/// Registers or adopts the worker; waits for nobody.
pub async fn join(
    client: &Client,
    host: &Arc<dyn Host>,
    name: &str,
    told: &Told,
    identity: &v1::Identity,
) -> Result<(), AgentError> {
    let record = match client.worker_get(name, None).await {
        Ok(answer) => answer.worker,
        Err(error) if error.code() == Some(Code::NotFound) => None,
        Err(error) => return Err(error.into()),
    };
    let asked = host.clone();
    let driver = spawn_blocking(move || asked.gpus()).await;
    let driver = driver.unwrap_or_else(|error| Err(error.to_string())).unwrap_or_else(|why| {
        warn!(why, "the GPUs of the driver cannot be listed");
        Vec::new()
    });
    let spec = record.as_ref().map(|worker| worker.spec.clone().unwrap_or_default());
    match step(name, spec.as_ref(), told, identity, driver)? {
        Step::Nothing => info!(worker = name, "the worker is registered as it is"),
        Step::Register(spec) => {
            client.worker_register(name, spec).await?;
            info!(worker = name, "the worker is registered");
        }
        Step::Update { spec, fields } => {
            info!(worker = name, ?fields, "the worker is adopted");
            let was = record.and_then(|worker| worker.spec).and_then(|spec| spec.identity);
            if was.is_none_or(|was| was.machine_id != identity.machine_id) {
                client.worker_update(name, spec, fields).await?;
                return Ok(());
            }
            let (me, rest): (Vec<_>, Vec<_>) = fields.into_iter().partition(|f| f == IDENTITY);
            if !me.is_empty() {
                client.worker_update(name, spec.clone(), me).await?;
            }
            if rest.is_empty() {
                return Ok(());
            }
            match client.worker_update(name, spec, rest.clone()).await {
                Err(error) if can_wait(&error) => warn!(
                    worker = name,
                    %error,
                    "{} of the record stay as they are until the agent is started again",
                    rest.join(", ")
                ),
                answer => drop(answer?),
            }
        }
    }
    Ok(())
}

/// What is held has no place in what the agent was told, or there is no room. Only an agent that goes on
/// can tell when that is over.
fn can_wait(error: &ClientError) -> bool {
    let would_lose = |refused: &Refused| refused.is_for(precondition::WOULD_LOSE);
    error.reason() == Some(reason::LOW_SPACE)
        || matches!(error, ClientError::Refused(refused) if would_lose(refused))
}

/// `driver`: the GPUs that it shows.
pub fn step(
    name: &str,
    record: Option<&v1::WorkerSpec>,
    told: &Told,
    identity: &v1::Identity,
    driver: Vec<v1::GpuSpec>,
) -> Result<Step, AgentError> {
    let names_gpus = told.fields.iter().any(|field| field == GPUS);
    let Some(record) = record else {
        if told.spec.address.is_empty() {
            return Err(AgentError::NoSuchWorker { worker: name.into() });
        }
        let mut spec = told.spec.clone();
        spec.identity = Some(identity.clone());
        if !names_gpus || (told.gpus_of_driver && !driver.is_empty()) {
            spec.gpus = driver;
        }
        return Ok(Step::Register(spec));
    };
    if let Some(other) = &record.identity
        && other.machine_id != identity.machine_id
        && !told.take_over
    {
        return Err(AgentError::OfAnotherMachine { worker: name.into(), machine: other.clone() });
    }
    let mut spec = told.spec.clone();
    spec.identity = Some(identity.clone());
    let mut fields = told.fields.clone();
    if told.gpus_of_driver && driver.is_empty() {
        // It may not be up yet.
        warn!(worker = name, "the driver shows no GPUs; the record keeps those that it has");
        fields.retain(|field| field != GPUS);
    } else if told.gpus_of_driver {
        spec.gpus = driver;
        if !names_gpus {
            fields.push(GPUS.into());
        }
    } else if !names_gpus && !driver.is_empty() && !same_gpus(&record.gpus, &driver) {
        warn!(
            worker = name,
            "the driver shows other GPUs than the record has, which stays; --gpus-of-driver takes them"
        );
    }
    if record.identity.as_ref() != Some(identity) {
        fields.push(IDENTITY.into());
    }
    fields.retain(|field| differs(field, record, &spec));
    if fields.is_empty() { Ok(Step::Nothing) } else { Ok(Step::Update { spec, fields }) }
}

/// Who has made a record its own that was `me`'s; `None`: nobody has. In a cluster that was begun from a
/// backup it may be what this machine was then.
pub fn taken_by(record: v1::Worker, me: &v1::Identity) -> Option<v1::Identity> {
    let restored = record.phase() == v1::WorkerPhase::Unverified;
    let was_me = |by: &v1::Identity| by.machine_id == me.machine_id && by.boot_id != me.boot_id;
    let by = record.spec?.identity?;
    (by != *me && !(restored && was_me(&by))).then_some(by)
}

/// Would taking this field change the record?
fn differs(field: &str, record: &v1::WorkerSpec, spec: &v1::WorkerSpec) -> bool {
    match field {
        "address" => record.address != spec.address,
        "labels" => record.labels != spec.labels,
        "ranges" => record.ranges != spec.ranges,
        "reserved" => record.reserved != spec.reserved,
        GPUS => record.gpus != spec.gpus,
        IDENTITY => record.identity != spec.identity,
        _ => true,
    }
}

/// Does a record name the GPUs of the driver, as far as it says which they are?
fn same_gpus(record: &[v1::GpuSpec], driver: &[v1::GpuSpec]) -> bool {
    let named = |gpu: &v1::GpuSpec| {
        let found = driver.iter().find(|other| other.index == gpu.index);
        found.is_some_and(|other| gpu.uuid.is_empty() || other.uuid == gpu.uuid)
    };
    record.len() == driver.len() && record.iter().all(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::fake::served;
    use crate::agent::host::{Seen, Wanted};
    use crate::agent::ranges::LocalPorts;
    use crate::api::fake;

    fn identity(machine: &str, boot: &str) -> v1::Identity {
        v1::Identity { machine_id: machine.into(), boot_id: boot.into(), namespace: 1 }
    }

    fn told(address: &str, fields: &[&str]) -> Told {
        let ranges = vec![v1::PortRange { name: "service".into(), first: 1, last: 9 }];
        let spec = v1::WorkerSpec { address: address.into(), ranges, ..Default::default() };
        let fields = fields.iter().map(ToString::to_string).collect();
        Told { spec, fields, ..Told::default() }
    }

    fn gpu(index: u32, uuid: &str) -> v1::GpuSpec {
        v1::GpuSpec { index, uuid: uuid.into(), ..Default::default() }
    }

    fn record(identity: Option<v1::Identity>) -> v1::WorkerSpec {
        v1::WorkerSpec { address: "h".into(), identity, ..Default::default() }
    }

    #[test]
    fn a_new_worker_is_registered_with_what_was_told_and_what_the_driver_shows() {
        let (me, told) = (identity("m", "b"), told("h", &["address", "ranges"]));
        let step = step("w", None, &told, &me, vec![gpu(0, "A")]).unwrap();
        let Step::Register(spec) = step else { panic!("{step:?}") };
        assert_eq!((spec.identity, spec.gpus), (Some(me), vec![gpu(0, "A")]));
        assert_eq!(spec.ranges, told.spec.ranges);
    }

    #[test]
    fn a_record_is_taken_by_another_and_not_by_what_this_machine_was_at_the_backup() {
        use v1::WorkerPhase::{Ready, Unverified};
        let me = identity("m", "b2");
        let taken = |phase: v1::WorkerPhase, by: Option<v1::Identity>| {
            let spec = Some(record(by));
            taken_by(v1::Worker { phase: phase.into(), spec, ..Default::default() }, &me)
        };
        assert_eq!(taken(Ready, None), None);
        assert_eq!(taken(Ready, Some(me.clone())), None);
        assert_eq!(taken(Unverified, Some(identity("m", "b1"))), None);
        for (phase, by) in [(Ready, identity("m", "b1")), (Unverified, identity("n", "b1"))] {
            assert_eq!(taken(phase, Some(by.clone())), Some(by));
        }
    }

    #[test]
    fn a_new_worker_needs_an_address() {
        let error = step("w", None, &told("", &[]), &identity("m", "b"), vec![]).unwrap_err();
        assert!(error.to_string().contains("--address"), "{error}");
    }

    #[test]
    fn a_worker_that_is_registered_gets_an_identity_and_keeps_the_rest() {
        let me = identity("m", "b");
        let driver = || vec![gpu(0, "A")];
        let adopt = step("w", Some(&record(None)), &told("", &[]), &me, driver()).unwrap();
        let Step::Update { spec, fields } = adopt else { panic!("{adopt:?}") };
        assert_eq!((fields, spec.identity.as_ref()), (vec![IDENTITY.to_string()], Some(&me)));
        // What the flags name is changed too, if it is another.
        let named = told("h", &["address", "ranges"]);
        let adopt = step("w", Some(&record(None)), &named, &me, driver()).unwrap();
        let Step::Update { fields, .. } = adopt else { panic!("{adopt:?}") };
        assert_eq!(fields, ["ranges", IDENTITY]);
        let gpus = Told { gpus_of_driver: true, ..told("", &[]) };
        let adopt = step("w", Some(&record(Some(me.clone()))), &gpus, &me, driver()).unwrap();
        let Step::Update { spec, fields } = adopt else { panic!("{adopt:?}") };
        assert_eq!((fields, spec.gpus), (vec![GPUS.to_string()], driver()));
        // A driver that shows none may not be up yet.
        let has = v1::WorkerSpec { gpus: driver(), ..record(Some(me.clone())) };
        assert_eq!(step("w", Some(&has), &gpus, &me, vec![]).unwrap(), Step::Nothing);
    }

    struct Booted(v1::Identity);

    impl Host for Booted {
        fn identity(&self) -> std::io::Result<v1::Identity> {
            Ok(self.0.clone())
        }
        fn local_ports(&self) -> std::io::Result<LocalPorts> {
            Ok(LocalPorts { first: 1, last: 0, reserved: vec![] })
        }
        fn gpus(&self) -> Result<Vec<v1::GpuSpec>, String> {
            Ok(vec![])
        }
        fn blind_spots(&self) -> Vec<String> {
            vec![]
        }
        fn look(&self, _: &Wanted) -> std::io::Result<Seen> {
            Err(std::io::Error::other("nothing is looked at"))
        }
    }

    /// What is held there would have no place in the ranges that the agent is told.
    #[tokio::test]
    async fn a_boot_is_named_also_where_the_rest_does_not_fit() {
        let (_, client) = served().await;
        let (old, new) = (identity("m", "b1"), identity("m", "b2"));
        let watched = v1::WorkerSpec { identity: Some(old.clone()), ..fake::spec() };
        client.worker_register("w", watched.clone()).await.unwrap();
        client.allocate(vec![fake::claim("b")]).await.unwrap();
        let told = told("h", &["ranges"]);
        let elsewhere = identity("other", "b");
        let took = Told { take_over: true, ..told.clone() };
        let booted =
            |identity: &v1::Identity| -> Arc<dyn Host> { Arc::new(Booted(identity.clone())) };
        let refused = join(&client, &booted(&elsewhere), "w", &took, &elsewhere).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("is held"), "{refused}");
        join(&client, &booted(&new), "w", &told, &new).await.unwrap();
        let spec = client.worker_get("w", None).await.unwrap().worker.unwrap().spec.unwrap();
        assert_eq!((spec.identity, spec.ranges), (Some(new), watched.ranges));
    }

    #[test]
    fn after_a_boot_the_new_identity_is_named_and_before_it_nothing() {
        let (old, new) = (identity("m", "b1"), identity("m", "b2"));
        let record = record(Some(old.clone()));
        let again = step("w", Some(&record), &told("", &[]), &old, vec![]).unwrap();
        assert_eq!(again, Step::Nothing);
        let booted = step("w", Some(&record), &told("", &[]), &new, vec![]).unwrap();
        let Step::Update { spec, fields } = booted else { panic!("{booted:?}") };
        assert_eq!((fields, spec.identity), (vec![IDENTITY.to_string()], Some(new)));
    }

    #[test]
    fn a_record_of_another_machine_is_left_alone_unless_it_is_to_be_taken_over() {
        let record = record(Some(identity("other", "b")));
        let me = identity("m", "b");
        let error = step("w", Some(&record), &told("", &[]), &me, vec![]).unwrap_err();
        assert!(error.to_string().contains("machine other"), "{error}");
        let told = Told { take_over: true, ..told("", &[]) };
        let taken = step("w", Some(&record), &told, &me, vec![]).unwrap();
        assert!(matches!(taken, Step::Update { .. }));
    }
}
