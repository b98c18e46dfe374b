//! `serve`: one node, until it is told to stop.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;
use tracing::{info, warn};

use super::{Globals, log_to_stderr, parse, stopped, usage};
use crate::api::assembly::{Listeners, Server};
use crate::node::backups::BackupPlan;
use crate::node::{Entry, Lifecycle, NodeConfig, NodeId, Upkeep};
use crate::store::{DataDir, FATAL_EXIT, exit_at_once};

const DEFAULT_LISTEN: &str = "127.0.0.1:7601";
const DEFAULT_LISTEN_PEER: &str = "127.0.0.1:7701";
/// What Raft says at `info` is for its own developers; that a member cannot be reached, it says several
/// times a second, also of each vote that it asks for, and `raft::network` when that begins and ends.
const DEFAULT_LOG_LEVEL: &str = "info,openraft=warn,openraft::core::heartbeat=error,\
                                 openraft::core::raft_core=error,\
                                 openraft::replication=error,\
                                 openraft::engine::handler::replication_handler=error";
const BACKUP_EVERY: Duration = Duration::from_secs(3600);
const BACKUP_KEEP: usize = 24;
/// How long a node may take to hand over, to let open calls end, and to end Raft.
const STOP_MAX: Duration = Duration::from_secs(20);
/// How long a node that was removed says so before it stops.
const REMOVED_GRACE: Duration = Duration::from_secs(3);
/// Log entries after which a snapshot is written.
pub const SNAPSHOT_EVERY: u64 = 20_000;
/// Below this the node would do little else than write snapshots.
const SNAPSHOT_EVERY_MIN: u64 = 10;

/// Flags, environment and file have the same keys; a flag goes before the environment, and that
/// before the file.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[command(after_help = "\
Examples:
  # One of three nodes; start the others likewise with their own id, directory and addresses
  portwarden serve --id 1 --data-dir ./n1 --listen 127.0.0.1:7601 --listen-peer 127.0.0.1:7701 \\
    --listen-http 127.0.0.1:7801 \\
    --initial-cluster 1=127.0.0.1:7701,2=127.0.0.1:7702,3=127.0.0.1:7703

  # One more, which any member takes in; `portwarden member promote 4` makes it a voter
  portwarden serve --id 4 --data-dir ./n4 --listen 127.0.0.1:7604 --listen-peer 127.0.0.1:7704 \\
    --join 127.0.0.1:7701

  # From a file (id = 1, data-dir = \"./n1\", …)
  portwarden serve --config node1.toml

The list of --initial-cluster is read once, when the cluster begins: all nodes need the same one.
Later starts ignore both it and --join. SIGTERM or Ctrl-C stops the node in order: a leader hands over first.")]
pub struct Args {
    /// This node's id: a number from 1, never used again once the node is gone
    #[arg(long, env = "PORTWARDEN_ID")]
    id: Option<u64>,
    /// Where the node keeps its log and snapshots; locked while it runs
    #[arg(long, env = "PORTWARDEN_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where to listen for clients [default: 127.0.0.1:7601]
    #[arg(long, env = "PORTWARDEN_LISTEN", value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where to listen for the other nodes [default: 127.0.0.1:7701]
    #[arg(long, env = "PORTWARDEN_LISTEN_PEER", value_name = "HOST:PORT")]
    listen_peer: Option<String>,
    /// Where to listen for /metrics, /healthz and /readyz [default: nowhere]
    #[arg(long, env = "PORTWARDEN_LISTEN_HTTP", value_name = "HOST:PORT")]
    listen_http: Option<String>,
    /// The nodes that begin the cluster, by peer address: 1=HOST:PORT,2=HOST:PORT,3=HOST:PORT
    #[arg(long, env = "PORTWARDEN_INITIAL_CLUSTER", value_name = "LIST")]
    initial_cluster: Option<String>,
    /// Join the cluster of the node at this peer address, as a learner; see `member promote`
    #[arg(long, env = "PORTWARDEN_JOIN", value_name = "HOST:PORT")]
    join: Option<String>,
    /// Where clients reach this node, if not at --listen
    #[arg(long, env = "PORTWARDEN_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where the other nodes reach this one, if not at --listen-peer
    #[arg(long, env = "PORTWARDEN_ADVERTISE_PEER", value_name = "HOST:PORT")]
    advertise_peer: Option<String>,
    /// Write a snapshot after this many bytes of log entries, even before --snapshot-every is reached
    /// [default: 64MiB]
    #[arg(long, env = "PORTWARDEN_SNAPSHOT_EVERY_BYTES", value_name = "SIZE")]
    snapshot_every_bytes: Option<String>,
    /// Let the replicas compare their tables after so many log entries, and once a minute if
    /// anything changed; 0: never [default: 10000]
    #[arg(long, env = "PORTWARDEN_CHECKPOINT_EVERY", value_name = "ENTRIES")]
    checkpoint_every: Option<u64>,
    /// Refuse what makes the table grow while less is free for the data directories of the nodes,
    /// and keep a quarter of it in reserve; 0: never [default: 256MiB]
    #[arg(long, env = "PORTWARDEN_LOW_SPACE", value_name = "SIZE")]
    low_space: Option<String>,
    /// Reclaim what is not confirmed within this, where the claim does not say [default: 10m]
    #[arg(long, env = "PORTWARDEN_CONFIRM_WITHIN", value_name = "DURATION")]
    confirm_within: Option<String>,
    /// Reclaim what was confirmed once an agent has seen its ports closed for so long [default: 10m]
    #[arg(long, env = "PORTWARDEN_ZOMBIE_AFTER", value_name = "DURATION")]
    zombie_after: Option<String>,
    /// Place nothing new on a worker whose agent has been silent for so long [default: 30s]
    #[arg(long, env = "PORTWARDEN_WORKER_LOST_AFTER", value_name = "DURATION")]
    worker_lost_after: Option<String>,
    /// Give a port that was in conflict again after so long, where no agent watches [default: 5m]
    #[arg(long, env = "PORTWARDEN_QUARANTINE", value_name = "DURATION")]
    quarantine: Option<String>,
    /// Write backups of the table into this directory
    #[arg(long, env = "PORTWARDEN_BACKUP_DIR", value_name = "DIR")]
    backup_dir: Option<PathBuf>,
    /// Time between backups; skipped while nothing has changed [default: 1h]
    #[arg(long, env = "PORTWARDEN_BACKUP_EVERY", value_name = "DURATION")]
    backup_every: Option<String>,
    /// How many backups to keep [default: 24]
    #[arg(long, env = "PORTWARDEN_BACKUP_KEEP", value_name = "N")]
    backup_keep: Option<usize>,
    /// Listen beyond loopback without TLS: tokens and names travel in the clear
    #[arg(
        long,
        env = "PORTWARDEN_INSECURE",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    insecure: Option<bool>,
    /// Log entries from one snapshot of the table to the next; about twice as many are kept in the log
    /// [default: 20000]
    #[arg(long, env = "PORTWARDEN_SNAPSHOT_EVERY", value_name = "N")]
    snapshot_every: Option<u64>,
    /// error, warn, info, debug or trace, or a filter [default: info, and little of openraft]
    #[arg(long, env = "PORTWARDEN_LOG_LEVEL", value_name = "LEVEL")]
    log_level: Option<String>,
    /// A TOML file with the same keys
    #[arg(long, env = "PORTWARDEN_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
}

/// What `serve` was told, checked.
#[derive(Debug)]
struct Settings {
    node: NodeConfig,
    clients: SocketAddr,
    peers: SocketAddr,
    http: Option<SocketAddr>,
    log_level: String,
}

pub async fn run(args: Args, _: Globals) -> anyhow::Result<ExitCode> {
    let settings = args.with_file()?.check()?;
    log_to_stderr(&settings.log_level)?;
    let listeners = Listeners::bind(settings.clients, settings.peers, settings.http).await?;
    info!(
        id = settings.node.id,
        clients = %settings.clients,
        peers = %settings.peers,
        http = settings.http.map(tracing::field::display),
        data_dir = %settings.node.data_dir.display(),
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );
    let server = Server::start(settings.node, listeners).await?;
    until_stopped(vec![server]).await
}

/// Runs servers until SIGTERM or SIGINT, or until one of them fails.
pub(super) async fn until_stopped(servers: Vec<Server>) -> anyhow::Result<ExitCode> {
    let stopped = stopped()?;
    let entering = futures::future::try_join_all(servers.iter().map(Server::enter_cluster));
    let entered = async {
        match entering.await {
            Ok(_) => std::future::pending().await,
            Err(e) => e.to_string(),
        }
    };
    let failed = futures::future::select_all(servers.iter().map(|s| Box::pin(s.node.failed())));
    let removed = futures::future::select_all(servers.iter().map(|s| Box::pin(s.node.removed())));
    tokio::select! {
        why = entered => anyhow::bail!(why),
        (why, _, _) = failed => anyhow::bail!(why),
        (why, at, _) = removed => {
            // Its clients shall hear of it, and go elsewhere.
            warn!("{why}; it stops in {} s", REMOVED_GRACE.as_secs());
            tokio::time::sleep(REMOVED_GRACE).await;
            if !servers[at].node.took_part() {
                anyhow::bail!("{why}; a node that is to join needs an empty data directory and a new id");
            }
        }
        () = stopped => {}
    }
    info!("stopping");
    let asked_again = super::stopped()?;
    let stop = async {
        for server in servers {
            server.stop().await;
        }
    };
    // As safe as `kill -9`, and as quick: what was acknowledged is on the disks of a majority.
    tokio::select! {
        () = stop => Ok(ExitCode::SUCCESS),
        () = asked_again => exit_at_once(1, "asked again to stop: it ends at once"),
        () = tokio::time::sleep(STOP_MAX) => {
            let limit = STOP_MAX.as_secs();
            exit_at_once(FATAL_EXIT, &format!("not stopped within {limit} s, its disk may hang: it ends at once"))
        }
    }
}

impl Args {
    fn with_file(self) -> anyhow::Result<Args> {
        let Some(path) = &self.config else { return Ok(self) };
        let file: Args = parse::config(path)?;
        Ok(Args {
            id: self.id.or(file.id),
            data_dir: self.data_dir.or(file.data_dir),
            listen: self.listen.or(file.listen),
            listen_peer: self.listen_peer.or(file.listen_peer),
            listen_http: self.listen_http.or(file.listen_http),
            initial_cluster: self.initial_cluster.or(file.initial_cluster),
            join: self.join.or(file.join),
            advertise: self.advertise.or(file.advertise),
            advertise_peer: self.advertise_peer.or(file.advertise_peer),
            snapshot_every: self.snapshot_every.or(file.snapshot_every),
            snapshot_every_bytes: self.snapshot_every_bytes.or(file.snapshot_every_bytes),
            checkpoint_every: self.checkpoint_every.or(file.checkpoint_every),
            low_space: self.low_space.or(file.low_space),
            confirm_within: self.confirm_within.or(file.confirm_within),
            zombie_after: self.zombie_after.or(file.zombie_after),
            worker_lost_after: self.worker_lost_after.or(file.worker_lost_after),
            quarantine: self.quarantine.or(file.quarantine),
            backup_dir: self.backup_dir.or(file.backup_dir),
            backup_every: self.backup_every.or(file.backup_every),
            backup_keep: self.backup_keep.or(file.backup_keep),
            insecure: self.insecure.or(file.insecure),
            log_level: self.log_level.or(file.log_level),
            config: None,
        })
    }

    fn check(self) -> anyhow::Result<Settings> {
        let need = |flag: &str| usage(format!("{flag} is required (see portwarden serve --help)"));
        let id = self.id.ok_or_else(|| need("--id"))?;
        if id == 0 {
            return Err(usage("--id: 0 must be 1 or more"));
        }
        let data_dir = self.data_dir.clone().ok_or_else(|| need("--data-dir"))?;
        let snapshot_every = self.snapshot_every.unwrap_or(SNAPSHOT_EVERY);
        if snapshot_every < SNAPSHOT_EVERY_MIN {
            return Err(usage(format!(
                "--snapshot-every: {snapshot_every} must be {SNAPSHOT_EVERY_MIN} or more"
            )));
        }
        let clients = resolve("--listen", self.listen.as_deref().unwrap_or(DEFAULT_LISTEN))?;
        let peers =
            resolve("--listen-peer", self.listen_peer.as_deref().unwrap_or(DEFAULT_LISTEN_PEER))?;
        let http = self.listen_http.as_deref().map(|addr| resolve("--listen-http", addr));
        let http = http.transpose()?;
        let insecure = self.insecure.unwrap_or(false);
        let listened = [("--listen", clients), ("--listen-peer", peers)];
        for (flag, addr) in listened.into_iter().chain(http.map(|addr| ("--listen-http", addr))) {
            if !addr.ip().is_loopback() && !insecure {
                return Err(usage(format!(
                    "{flag}: {addr} is beyond loopback, and TLS is not available yet: names and \
                     tokens would travel in the clear. Listen on a loopback address, or pass \
                     --insecure on a network that you trust"
                )));
            }
        }
        let advertise = match &self.advertise {
            Some(addr) => host_port("--advertise", addr)?,
            None if clients.ip().is_unspecified() => {
                return Err(usage(format!(
                    "--listen: {clients} is every address; --advertise must say which one clients reach"
                )));
            }
            None => clients.to_string(),
        };
        let upkeep = check_upkeep(
            self.snapshot_every_bytes.as_deref(),
            self.checkpoint_every,
            self.low_space.as_deref(),
        )?;
        let lifecycle = self.check_lifecycle()?;
        let (entry, advertise_peer) = self.check_entry(id, &data_dir, peers)?;
        Ok(Settings {
            node: NodeConfig {
                id,
                data_dir,
                entry,
                advertise_peer,
                advertise,
                snapshot_every,
                upkeep,
                lifecycle,
                backups: self.check_backups()?,
            },
            clients,
            peers,
            http,
            log_level: self.log_level.unwrap_or_else(|| DEFAULT_LOG_LEVEL.into()),
        })
    }

    fn check_lifecycle(&self) -> anyhow::Result<Lifecycle> {
        let span = |flag: &str, text: &Option<String>, default| match text.as_deref() {
            None => Ok(default),
            Some(text) => {
                parse::span_of_time(text).map_err(|why| usage(format!("{flag}: {text:?} {why}")))
            }
        };
        let default = Lifecycle::default();
        Ok(Lifecycle {
            confirm_within: span("--confirm-within", &self.confirm_within, default.confirm_within)?,
            zombie_after: span("--zombie-after", &self.zombie_after, default.zombie_after)?,
            worker_lost_after: span(
                "--worker-lost-after",
                &self.worker_lost_after,
                default.worker_lost_after,
            )?,
            quarantine: span("--quarantine", &self.quarantine, default.quarantine)?,
        })
    }

    fn check_backups(&self) -> anyhow::Result<Option<BackupPlan>> {
        let Some(dir) = self.backup_dir.clone() else {
            for (flag, given) in [
                ("--backup-every", self.backup_every.is_some()),
                ("--backup-keep", self.backup_keep.is_some()),
            ] {
                if given {
                    return Err(usage(format!("{flag}: needs --backup-dir")));
                }
            }
            return Ok(None);
        };
        let every = match self.backup_every.as_deref() {
            None => BACKUP_EVERY,
            Some(text) => parse::span_of_time(text)
                .map_err(|why| usage(format!("--backup-every: {text:?} {why}")))?,
        };
        let keep = self.backup_keep.unwrap_or(BACKUP_KEEP);
        if keep == 0 {
            return Err(usage("--backup-keep: 0 must be 1 or more"));
        }
        // One that is not there may be mounted later: a node must not wait for it.
        if dir.exists() && !dir.is_dir() {
            return Err(usage(format!("--backup-dir: {} is no directory", dir.display())));
        }
        Ok(Some(BackupPlan { dir, every, keep }))
    }

    /// How the node comes to its cluster, and where the other nodes reach it.
    fn check_entry(
        &self,
        id: NodeId,
        data_dir: &Path,
        peers: SocketAddr,
    ) -> anyhow::Result<(Entry, String)> {
        let reached = self.advertise_peer.clone().unwrap_or_else(|| peers.to_string());
        let reached = host_port("--advertise-peer", &reached)?;
        match (&self.initial_cluster, &self.join) {
            (Some(_), Some(_)) => Err(usage(
                "--join: must be left out where --initial-cluster is given: a node begins a cluster \
                 or joins one",
            )),
            (None, None) if DataDir::knows_its_cluster(data_dir) => Ok((Entry::Begun, reached)),
            (None, None) => Err(usage(format!(
                "--initial-cluster or --join is required, as nothing has begun in {} yet (see \
                 portwarden serve --help)",
                data_dir.display()
            ))),
            (None, Some(_)) if self.advertise_peer.is_none() && peers.ip().is_unspecified() => {
                Err(usage(format!(
                    "--listen-peer: {peers} is every address; --advertise-peer must say which one \
                     the other nodes reach"
                )))
            }
            (None, Some(peer)) => Ok((Entry::Join(host_port("--join", peer)?), reached)),
            (Some(list), None) => {
                let initial_cluster = parse_initial_cluster(list)?;
                check_own(&initial_cluster, list, id, &reached)?;
                Ok((Entry::Begin(initial_cluster), reached))
            }
        }
    }
}

/// The list must name this node, where it listens.
fn check_own(
    nodes: &BTreeMap<NodeId, String>,
    list: &str,
    id: NodeId,
    reached: &str,
) -> anyhow::Result<()> {
    let Some(own) = nodes.get(&id) else {
        return Err(usage(format!(
            "--initial-cluster: {list} must name this node too: {id}=HOST:PORT"
        )));
    };
    if *own != reached && resolve("--initial-cluster", own).ok() != resolve("", reached).ok() {
        return Err(usage(format!(
            "--initial-cluster: the others would look for this node at {own}, but it listens at \
             {reached}; make them equal or say --advertise-peer {own}"
        )));
    }
    Ok(())
}

/// Spans of the log that are smaller would be snapshots all the time.
const SNAPSHOT_EVERY_BYTES_MIN: u64 = 1 << 20;

fn check_upkeep(
    snapshot_every_bytes: Option<&str>,
    checkpoint_every: Option<u64>,
    low_space: Option<&str>,
) -> anyhow::Result<Upkeep> {
    let size = |flag: &str, text: Option<&str>, default| match text.map(parse::size) {
        None => Ok(default),
        Some(Ok(bytes)) => Ok(bytes),
        Some(Err(why)) => Err(usage(format!("{flag}: {:?} {why}", text.unwrap_or_default()))),
    };
    let default = Upkeep::default();
    let snapshot_every_bytes =
        size("--snapshot-every-bytes", snapshot_every_bytes, default.snapshot_every_bytes)?;
    if snapshot_every_bytes < SNAPSHOT_EVERY_BYTES_MIN {
        return Err(usage(format!(
            "--snapshot-every-bytes: {snapshot_every_bytes} must be {SNAPSHOT_EVERY_BYTES_MIN} or more"
        )));
    }
    Ok(Upkeep {
        snapshot_every_bytes,
        checkpoint_every: checkpoint_every.unwrap_or(default.checkpoint_every),
        low_space_bytes: size("--low-space", low_space, default.low_space_bytes)?,
    })
}

/// Is it a `--config FILE`? For the fuzzers.
pub(super) fn parses(text: &str) -> bool {
    toml::from_str::<Args>(text).is_ok()
}

/// Most nodes that may begin a cluster: more voters only cost latency.
const INITIAL_NODES_MAX: usize = 7;

pub(super) fn parse_initial_cluster(list: &str) -> anyhow::Result<BTreeMap<NodeId, String>> {
    let mut nodes = BTreeMap::new();
    for part in list.split(',') {
        let bad = |why: &str| usage(format!("--initial-cluster: {part:?} {why}"));
        let (id, addr) = part.split_once('=').ok_or_else(|| bad("must be ID=HOST:PORT"))?;
        let id: NodeId =
            id.trim().parse().map_err(|_| bad("must begin with a node id, 1 or more"))?;
        if id == 0 {
            return Err(bad("must begin with a node id, 1 or more"));
        }
        let addr = host_port("--initial-cluster", addr.trim())?;
        if nodes.values().any(|other| *other == addr) {
            return Err(bad("has the address of another node"));
        }
        if nodes.insert(id, addr).is_some() {
            return Err(bad("has the id of another node"));
        }
    }
    if nodes.len() > INITIAL_NODES_MAX {
        let count = nodes.len();
        return Err(usage(format!(
            "--initial-cluster: {count} nodes must be at most {INITIAL_NODES_MAX}"
        )));
    }
    Ok(nodes)
}

fn host_port(flag: &str, text: &str) -> anyhow::Result<String> {
    parse::host_port(text).map_err(|why| usage(format!("{flag}: {text:?} {why}")))
}

fn resolve(flag: &str, text: &str) -> anyhow::Result<SocketAddr> {
    let text = host_port(flag, text)?;
    let found = text.to_socket_addrs().map(|mut addrs| addrs.next());
    match found {
        Ok(Some(addr)) => Ok(addr),
        Ok(None) => Err(usage(format!("{flag}: {text} has no address"))),
        Err(e) => Err(usage(format!("{flag}: {text} cannot be resolved: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(change: impl FnOnce(&mut Args)) -> anyhow::Result<Settings> {
        let mut args = Args {
            id: Some(1),
            data_dir: Some("d".into()),
            initial_cluster: Some("1=127.0.0.1:7701,2=127.0.0.1:7702".into()),
            ..Args::default()
        };
        change(&mut args);
        args.check()
    }

    fn refusal(change: impl FnOnce(&mut Args)) -> String {
        told(change).expect_err("a refusal").to_string()
    }

    #[test]
    fn defaults_listen_on_loopback() {
        let settings = told(|_| ()).expect("accepted");
        assert_eq!(settings.clients.to_string(), DEFAULT_LISTEN);
        assert_eq!(settings.node.advertise, DEFAULT_LISTEN);
        let Entry::Begin(nodes) = settings.node.entry else { panic!("it begins") };
        assert_eq!(nodes.len(), 2);
    }

    #[test]
    fn beyond_loopback_needs_a_word_and_names_tls() {
        let why = refusal(|a| a.listen_http = Some("0.0.0.0:7801".into()));
        assert!(why.contains("--listen-http") && why.contains("TLS") && why.contains("--insecure"));
        let allowed = told(|a| {
            a.listen = Some("0.0.0.0:7601".into());
            a.advertise = Some("10.0.0.1:7601".into());
            a.insecure = Some(true);
        });
        assert_eq!(allowed.expect("accepted").node.advertise, "10.0.0.1:7601");
        let why = refusal(|a| {
            a.listen = Some("0.0.0.0:7601".into());
            a.insecure = Some(true);
        });
        assert!(why.contains("--advertise"), "{why}");
    }

    #[test]
    fn every_wrong_list_is_refused_by_name() {
        for (list, says) in [
            ("", "ID=HOST:PORT"),
            ("1", "ID=HOST:PORT"),
            ("x=127.0.0.1:1", "node id"),
            ("0=127.0.0.1:1", "node id"),
            ("1=127.0.0.1", "HOST:PORT"),
            ("1=127.0.0.1:0", "1 to 65535"),
            ("1=127.0.0.1:65536", "1 to 65535"),
            ("1=127.0.0.1:7701,1=127.0.0.1:7702", "id of another"),
            ("1=127.0.0.1:7701,2=127.0.0.1:7701", "address of another"),
            ("2=127.0.0.1:7702", "this node too"),
            ("1=127.0.0.1:7709", "--advertise-peer"),
        ] {
            let why = refusal(|a| a.initial_cluster = Some(list.into()));
            assert!(why.contains(says), "{list:?}: {why}");
        }
    }

    #[test]
    fn upkeep_has_defaults_and_is_checked() {
        let settings = told(|_| ()).expect("accepted").node;
        assert_eq!((settings.snapshot_every, settings.upkeep), (SNAPSHOT_EVERY, Upkeep::default()));
        let file: Args = toml::from_str(
            "snapshot-every = 50\nsnapshot-every-bytes = \"2MiB\"\ncheckpoint-every = 0\n\
             low-space = \"8MiB\"",
        )
        .expect("TOML");
        let settings = told(|a| {
            a.snapshot_every = file.snapshot_every;
            a.snapshot_every_bytes = file.snapshot_every_bytes;
            a.checkpoint_every = file.checkpoint_every;
            a.low_space = file.low_space;
        });
        let node = settings.expect("accepted").node;
        let upkeep =
            Upkeep { snapshot_every_bytes: 2 << 20, checkpoint_every: 0, low_space_bytes: 8 << 20 };
        assert_eq!((node.snapshot_every, node.upkeep), (50, upkeep));
        for (why, says) in [
            (refusal(|a| a.snapshot_every_bytes = Some("1".into())), "--snapshot-every-bytes: 1"),
            (refusal(|a| a.low_space = Some("much".into())), "--low-space: \"much\" must be bytes"),
        ] {
            assert!(why.contains(says), "{why}");
        }
    }

    #[test]
    fn the_snapshot_interval_has_a_lower_limit() {
        let of = |n| told(|a| a.snapshot_every = n).map(|settings| settings.node.snapshot_every);
        assert_eq!(of(None).ok(), Some(SNAPSHOT_EVERY));
        assert_eq!(of(Some(SNAPSHOT_EVERY_MIN)).ok(), Some(SNAPSHOT_EVERY_MIN));
        let why = refusal(|a| a.snapshot_every = Some(SNAPSHOT_EVERY_MIN - 1));
        assert!(why.contains("--snapshot-every: 9 must be 10 or more"), "{why}");
    }

    #[test]
    fn the_file_fills_in_and_flags_win() {
        let file: Args =
            toml::from_str("id = 7\nlisten = \"127.0.0.1:1\"\nsnapshot-every = 99").expect("TOML");
        assert_eq!((file.id, file.listen.as_deref()), (Some(7), Some("127.0.0.1:1")));
        assert_eq!(file.snapshot_every, Some(99));
        assert!(toml::from_str::<Args>("idd = 7").is_err(), "unknown keys are refused");
        assert!(toml::from_str::<Args>("config = \"x\"").is_err());
    }
}
