//! One server of PostgreSQL, with a table of ports as one would write it.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use portwarden::cli::bench::load::{Caller, Done};
use rustix::process::{Signal, geteuid};
use tokio_postgres::{Client, NoTls, Statement};

use super::ours::Left;
use super::processes::{Process, free_ports, output};

const WORKERS: i32 = 20;
const PORTS: i32 = 1024;

pub struct Postgres {
    port: u16,
    _server: Process,
}

impl Postgres {
    /// Where this is root, `dir` is made readable for all.
    pub async fn start(dir: &Path) -> anyhow::Result<Postgres> {
        let bin = newest_bin()?;
        let data = dir.join("postgres");
        std::fs::create_dir_all(&data)?;
        // It does not run as root.
        let user = if geteuid().is_root() { Some(debians_user()?) } else { None };
        if let Some((uid, gid)) = user {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
            chown(&data, Some(uid), Some(gid))?;
        }
        // Not through `runuser` and the like: the server would be a child of what is started.
        let as_user = |program: &str| {
            let mut command = Command::new(bin.join(program));
            if let Some((uid, gid)) = user {
                command.uid(uid).gid(gid).current_dir("/");
            }
            command
        };
        let mut initdb = as_user("initdb");
        output(initdb.args(["--auth", "trust", "-U", "bench", "-D"]).arg(&data))?;
        let port = free_ports(1)?[0];
        let mut command = as_user("postgres");
        // No socket in the file system: its path may not be long.
        command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k", ""]);
        for setting in ["fsync=on", "synchronous_commit=on", "max_connections=300"] {
            command.args(["-c", setting]);
        }
        // An immediate shutdown: it ends its processes, and gives its shared memory back.
        let log = dir.join("postgres.log");
        let server = Process::start_to_end_by(Signal::QUIT, &mut command, &log)?;
        let postgres = Postgres { port, _server: server };
        postgres.fill().await?;
        Ok(postgres)
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let config = format!("host=127.0.0.1 port={} user=bench dbname=postgres", self.port);
        let (client, connection) = tokio_postgres::connect(&config, NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    async fn fill(&self) -> anyhow::Result<()> {
        for attempt in 0.. {
            match self.connect().await {
                Ok(client) => {
                    let table = format!(
                        "CREATE TABLE ports (worker int, port int, holder text, PRIMARY KEY (worker, port));
                         CREATE INDEX free ON ports (worker, port) WHERE holder IS NULL;
                         INSERT INTO ports SELECT w, p FROM generate_series(0, {WORKERS} - 1) w,
                             generate_series(0, {PORTS} - 1) p;"
                    );
                    return Ok(client.batch_execute(&table).await?);
                }
                Err(error) if attempt == 300 => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        Ok(())
    }

    pub async fn callers(
        &self,
        name: &str,
        clients: u32,
    ) -> anyhow::Result<(Vec<Box<dyn Caller>>, Option<Left>)> {
        let mut callers: Vec<Box<dyn Caller>> = Vec::new();
        for i in 0..clients {
            let client = self.connect().await?;
            let allocate = client
                .prepare(
                    "UPDATE ports SET holder = $1 WHERE (worker, port) = (
                         SELECT worker, port FROM ports WHERE worker = $2 AND holder IS NULL
                         ORDER BY port LIMIT 1 FOR UPDATE SKIP LOCKED)
                     RETURNING port",
                )
                .await?;
            let release = client
                .prepare("UPDATE ports SET holder = NULL WHERE worker = $1 AND port = $2")
                .await?;
            let worker = if name == "hot" { 0 } else { i as i32 % WORKERS };
            let holder = format!("instance-{i}");
            callers.push(Box::new(Ports { client, allocate, release, worker, holder, held: None }));
        }
        Ok((callers, None))
    }
}

struct Ports {
    client: Client,
    allocate: Statement,
    release: Statement,
    worker: i32,
    holder: String,
    held: Option<i32>,
}

#[tonic::async_trait]
impl Caller for Ports {
    async fn call(&mut self) -> Result<Done, String> {
        if let Some(port) = self.held.take() {
            let released = self.client.execute(&self.release, &[&self.worker, &port]).await;
            return released.map(|_| Done::one("release")).map_err(|e| e.to_string());
        }
        let row = self.client.query_opt(&self.allocate, &[&self.holder, &self.worker]).await;
        let row = row.map_err(|e| e.to_string())?.ok_or("no port is free")?;
        self.held = Some(row.get(0));
        Ok(Done { kind: "allocate", operations: 1, ports: 1 })
    }
}

pub fn version() -> anyhow::Result<String> {
    output(Command::new(newest_bin()?.join("postgres")).arg("--version"))
}

/// Debian keeps each major version's programs in a directory of its own.
fn newest_bin() -> anyhow::Result<PathBuf> {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
    let bins = versions.filter_map(|version| Some(version.ok()?.path().join("bin")));
    bins.filter(|bin| bin.join("initdb").exists()).max().context("PostgreSQL is not installed")
}

/// The user and group that Debian's package makes.
fn debians_user() -> anyhow::Result<(u32, u32)> {
    let id = |what| anyhow::Ok(output(Command::new("id").args([what, "postgres"]))?.parse()?);
    Ok((id("-u")?, id("-g")?))
}
