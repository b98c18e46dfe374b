//! One server of PostgreSQL, with a table of ports as one would write it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use portwarden::cli::bench::load::{Caller, Done};
use tokio_postgres::{Client, NoTls, Statement};

use super::ours::Left;
use super::processes::{Process, free_ports};

const WORKERS: i32 = 20;
const PORTS: i32 = 1024;

pub struct Postgres {
    port: u16,
    _server: Process,
}

impl Postgres {
    pub async fn start(dir: &Path) -> anyhow::Result<Postgres> {
        let bin = newest_bin()?;
        let data = dir.join("postgres");
        std::fs::create_dir_all(&data)?;
        // It does not run as root.
        let root = is_root()?;
        if root {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
            let chown = Command::new("chown").arg("postgres").arg(&data).status()?;
            ensure!(chown.success(), "{} cannot be given to postgres", data.display());
        }
        let as_user = |program: &str| {
            let program = bin.join(program);
            if !root {
                return Command::new(program);
            }
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program).current_dir("/");
            command
        };
        let made = as_user("initdb")
            .args(["--auth", "trust", "-U", "bench", "-D"])
            .arg(&data)
            .output()
            .context("initdb")?;
        ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = free_ports(1)?[0];
        let mut command = as_user("postgres");
        command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k"]);
        command.arg(&data);
        for setting in ["fsync=on", "synchronous_commit=on", "max_connections=300"] {
            command.args(["-c", setting]);
        }
        let server = Process::start(&mut command, &dir.join("postgres.log"))?;
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

/// Debian keeps each major version's programs in a directory of its own.
fn newest_bin() -> anyhow::Result<std::path::PathBuf> {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
    let bins = versions.filter_map(|version| Some(version.ok()?.path().join("bin")));
    bins.filter(|bin| bin.join("initdb").exists()).max().context("PostgreSQL is not installed")
}

fn is_root() -> anyhow::Result<bool> {
    let id = Command::new("id").arg("-u").output()?;
    Ok(String::from_utf8_lossy(&id.stdout).trim() == "0")
}
