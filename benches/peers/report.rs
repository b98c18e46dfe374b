//! What came out: medians over the rounds, the ratios between the systems, tables and plots.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use portwarden::cli::bench::load::Report;
use serde::Serialize;

use super::failover::LeaderMove;

#[derive(Debug, Serialize)]
pub struct Whole {
    pub commit: String,
    pub machine: String,
    pub rounds: u32,
    pub seconds_a_round: u64,
    /// Median of `fdatasync` after appends of 4 KiB, on the disk that all of them are on, before each round.
    pub fdatasync_ms: f64,
    #[serde(skip)]
    fdatasyncs: Vec<f64>,
    pub rows: Vec<Summary>,
    /// From the loss of the leader to the next acknowledged change: its process killed, and stopped.
    pub failover_ms: Failovers,
    pub stopped_ms: Failovers,
    pub leader_move: LeaderMove,
    /// Ours against theirs: the larger, the better for portwarden.
    pub ratios: BTreeMap<&'static str, f64>,
}

/// One workload on one system. Rates are operations a second.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub system: String,
    pub workload: String,
    pub clients: u32,
    pub what: String,
    pub median_per_second: f64,
    pub min_per_second: f64,
    pub max_per_second: f64,
    pub ports_per_second: f64,
    /// Medians over the rounds, of whole calls: on sessions, of batches.
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub errors: u64,
    pub example_error: Option<String>,
}

#[derive(Debug, Default, Serialize)]
pub struct Failovers {
    pub portwarden: Vec<f64>,
    pub etcd: Vec<f64>,
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Summary {
    pub fn of(
        system: &str,
        workload: &str,
        clients: u32,
        what: &str,
        reports: &[Report],
    ) -> Summary {
        let rates = || reports.iter().map(|report| report.operations_per_second);
        let latency = |at: fn(&Report) -> f64| median(reports.iter().map(at));
        Summary {
            system: system.into(),
            workload: workload.into(),
            clients,
            what: what.into(),
            median_per_second: median(rates()),
            min_per_second: rates().fold(f64::INFINITY, f64::min),
            max_per_second: rates().fold(0.0, f64::max),
            ports_per_second: latency(|report| report.ports_per_second),
            p50_ms: latency(|report| report.latency["all"].p50_ms),
            p99_ms: latency(|report| report.latency["all"].p99_ms),
            errors: reports.iter().map(|report| report.errors).sum(),
            example_error: reports.iter().find_map(|report| report.example_error.clone()),
        }
    }
}

impl Whole {
    pub fn begin(rounds: u32, seconds_a_round: u64) -> Whole {
        Whole {
            commit: output("git", &["describe", "--always", "--dirty"]),
            machine: machine(),
            rounds,
            seconds_a_round,
            fdatasync_ms: 0.0,
            fdatasyncs: Vec::new(),
            rows: Vec::new(),
            failover_ms: Failovers::default(),
            stopped_ms: Failovers::default(),
            leader_move: LeaderMove::default(),
            ratios: BTreeMap::new(),
        }
    }

    /// What the disk takes for a sync, without anybody's software.
    pub fn probe(&mut self, dir: &Path) -> anyhow::Result<()> {
        let path = dir.join("fdatasync");
        let mut file = fs::File::create(&path)?;
        for _ in 0..100 {
            file.write_all(&[7; 4096])?;
            let began = Instant::now();
            file.sync_data()?;
            self.fdatasyncs.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        fs::remove_file(&path)?;
        self.fdatasync_ms = median(self.fdatasyncs.iter().copied());
        Ok(())
    }

    fn row(&self, system: &str, workload: &str, clients: u32) -> Option<&Summary> {
        let is = |row: &&Summary| {
            (row.system.as_str(), row.workload.as_str(), row.clients) == (system, workload, clients)
        };
        self.rows.iter().find(is)
    }

    /// Computes the ratios, where both sides were measured.
    pub fn finish(&mut self) {
        let rate = |system, workload, clients| {
            self.row(system, workload, clients).map(|row| row.median_per_second)
        };
        let session = |clients| rate("portwarden", "session", clients);
        let p50 = |system, workload| self.row(system, workload, 1).map(|row| row.p50_ms);
        let (p50_rpc, p50_stream) = (p50("portwarden", "allocate"), p50("portwarden", "session"));
        let fdatasync = Some(self.fdatasync_ms);
        let over = |ours: Option<f64>, theirs: Option<f64>| Some(ours? / theirs?);
        let failover = |times: &[f64]| (!times.is_empty()).then(|| median(times.iter().copied()));
        let lost = |both: &Failovers| over(failover(&both.etcd), failover(&both.portwarden));
        let put = |clients| rate("etcd", "put", clients);
        let hot = rate("portwarden", "hot", 64);
        let hot_session = rate("portwarden", "hot-session", 64);
        let hot_pipelined = rate("portwarden", "hot-session", 2048);
        let ratios = [
            ("allocate_rpc_vs_etcd_put_64", over(rate("portwarden", "allocate", 64), put(64))),
            ("allocate_rpc_vs_etcd_put_256", over(rate("portwarden", "allocate", 256), put(256))),
            ("allocate_stream_vs_etcd_put_256", over(session(256), put(256))),
            ("allocate_stream_vs_etcd_put_2048", over(session(2048), put(2048))),
            ("allocate_hot_vs_etcd_any_64", over(hot, rate("etcd", "any", 64))),
            ("allocate_hot_stream_vs_etcd_any_64", over(hot_session, rate("etcd", "any", 64))),
            (
                "select_vs_allocate_stream_2048",
                over(rate("portwarden", "select", 2048), session(2048)),
            ),
            ("allocate_hot_vs_postgres_64", over(hot, rate("postgres", "hot", 64))),
            ("allocate_hot_vs_etcd_txn_64", over(hot, rate("etcd", "hot", 64))),
            ("allocate_hot_stream_vs_postgres_64", over(hot_session, rate("postgres", "hot", 64))),
            ("allocate_hot_stream_vs_etcd_txn_64", over(hot_session, rate("etcd", "hot", 64))),
            (
                "allocate_hot_pipelined_vs_postgres_64",
                over(hot_pipelined, rate("postgres", "hot", 64)),
            ),
            ("allocate_hot_pipelined_vs_etcd_txn_64", over(hot_pipelined, rate("etcd", "hot", 64))),
            ("etcd_p50_vs_ours_1", over(p50("etcd", "put"), p50_rpc)),
            ("etcd_p50_vs_ours_stream_1", over(p50("etcd", "put"), p50_stream)),
            ("ours_p50_1_vs_fdatasync", over(p50_rpc, fdatasync)),
            ("ours_p50_stream_1_vs_fdatasync", over(p50_stream, fdatasync)),
            ("ours_p50_1_vs_bare", over(p50_rpc, p50("bare", "call"))),
            ("bare_p50_1_vs_fdatasync", over(p50("bare", "call"), fdatasync)),
            ("bare_rpc_vs_etcd_put_64", over(rate("bare", "call", 64), put(64))),
            ("bare_rpc_vs_etcd_put_256", over(rate("bare", "call", 256), put(256))),
            (
                "bare_stream_vs_postgres_hot_64",
                over(rate("bare", "session", 64), rate("postgres", "hot", 64)),
            ),
            (
                "bare_stream_vs_etcd_txn_64",
                over(rate("bare", "session", 64), rate("etcd", "hot", 64)),
            ),
            ("bare_stream_vs_etcd_put_2048", over(rate("bare", "session", 2048), put(2048))),
            ("bare_table_vs_etcd_put_2048", over(rate("bare", "table", 2048), put(2048))),
            ("get_vs_etcd_256", over(rate("portwarden", "get", 256), rate("etcd", "get", 256))),
            (
                "get_stream_vs_etcd_256",
                over(rate("portwarden", "get-session", 256), rate("etcd", "get", 256)),
            ),
            (
                "get_stale_vs_etcd_256",
                over(rate("portwarden", "get-stale", 256), rate("etcd", "get-stale", 256)),
            ),
            (
                "ours_p99_vs_p50_256",
                self.row("portwarden", "allocate", 256).map(|row| row.p99_ms / row.p50_ms),
            ),
            (
                "gang64_ports_per_second",
                self.row("portwarden", "gang64", 64).map(|row| row.ports_per_second),
            ),
            ("etcd_failover_vs_ours", lost(&self.failover_ms)),
            ("etcd_stopped_vs_ours", lost(&self.stopped_ms)),
        ];
        self.ratios = ratios.into_iter().filter_map(|(name, is)| Some((name, is?))).collect();
    }

    /// Markdown.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{}; commit {}; {} rounds of {} s; fdatasync of 4 KiB {:.2} ms\n\n",
            self.machine, self.commit, self.rounds, self.seconds_a_round, self.fdatasync_ms
        );
        text.push_str(
            "| system | workload | clients | per second (min–max) | p50 ms | p99 ms | errors |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.0} ({:.0}–{:.0}) | {:.2} | {:.2} | {} |",
                row.system,
                row.workload,
                row.clients,
                row.median_per_second,
                row.min_per_second,
                row.max_per_second,
                row.p50_ms,
                row.p99_ms,
                row.errors
            );
        }
        text.push_str("\n| ratio | is |\n|---|---|\n");
        for (name, is) in &self.ratios {
            let _ = writeln!(text, "| {name} | {is:.1} |");
        }
        let list = |times: &[f64]| {
            times.iter().map(|ms| format!("{ms:.0}")).collect::<Vec<_>>().join(", ")
        };
        let LeaderMove { moves, requests, failed, longest_stall_ms, longest_without_ms } =
            &self.leader_move;
        let _ = write!(
            text,
            "\nLeader killed, ms until the next acknowledged change: portwarden {}; etcd {}. Stopped: portwarden {}; etcd {}.\n\
             Leader moved {moves} times under {requests} requests: {failed} failed, the longest took {longest_stall_ms:.0} ms ({longest_without_ms:.0} ms while it stayed).\n",
            list(&self.failover_ms.portwarden),
            list(&self.failover_ms.etcd),
            list(&self.stopped_ms.portwarden),
            list(&self.stopped_ms.etcd),
        );
        text
    }

    /// Throughput by system and workload, on a logarithmic scale.
    pub fn plot(&self, dir: &Path) -> anyhow::Result<()> {
        const LEFT: f64 = 230.0;
        const WIDTH: f64 = 520.0;
        const BAR: f64 = 20.0;
        let most = self.rows.iter().map(|row| row.max_per_second).fold(10.0, f64::max).log10();
        let at = |rate: f64| (rate.max(1.0).log10() / most) * WIDTH;
        let height = 40.0 + BAR * self.rows.len() as f64;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"10\" y=\"18\">operations a second, median and range of {} rounds, logarithmic</text>\n",
            LEFT + WIDTH + 90.0,
            height + 10.0,
            self.rounds
        );
        for (i, row) in self.rows.iter().enumerate() {
            let y = 30.0 + BAR * i as f64;
            let colour = match row.system.as_str() {
                "portwarden" => "#2b6cb0",
                "etcd" => "#9f7aea",
                _ => "#718096",
            };
            let (low, high) = (at(row.min_per_second), at(row.max_per_second));
            let _ = write!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} {} × {}</text>\n\
                 <rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>\n\
                 <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{}\" y2=\"{}\" stroke=\"black\"/>\n\
                 <text x=\"{:.1}\" y=\"{}\">{:.0}</text>\n",
                LEFT - 8.0,
                y + 12.0,
                row.system,
                row.workload,
                row.clients,
                at(row.median_per_second),
                LEFT + low,
                LEFT + high,
                y + 7.0,
                y + 7.0,
                LEFT + high + 6.0,
                y + 12.0,
                row.median_per_second
            );
        }
        svg.push_str("</svg>\n");
        fs::create_dir_all(dir)?;
        fs::write(dir.join("throughput.svg"), svg)?;
        Ok(())
    }
}

fn output(program: &str, args: &[&str]) -> String {
    let run = Command::new(program).args(args).output();
    run.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_string()).unwrap_or_default()
}

fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    format!("{cpus} cores, {}, Linux {}", model.unwrap_or("unknown"), output("uname", &["-r"]))
}
