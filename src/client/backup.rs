//! A copy of the whole table.

use std::io::{self, Write};

use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::call::by;
use super::error::{Verdict, judge};
use super::{Client, ClientError};
use crate::proto::v1;

const PATH: &str = "/portwarden.v1.Cluster/Snapshot";

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Write(#[from] io::Error),
}

/// What a copy is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copied {
    pub revision: u64,
    pub allocations: u64,
    pub workers: u64,
    pub bytes: u64,
}

enum Broken {
    Verdict(Verdict),
    Write(io::Error),
}

impl Client {
    /// Writes a copy of the table, from whichever node serves it. Where one breaks off, the next
    /// attempt begins anew, with what `fresh` makes; it ends when nothing has come for the timeout.
    pub async fn backup<W: Write>(
        &self,
        mut fresh: impl FnMut() -> io::Result<W>,
        mut progress: impl FnMut(Copied),
    ) -> Result<(W, Copied), BackupError> {
        let mut tour = self.tour();
        let mut came = Instant::now();
        loop {
            let mut out = fresh()?;
            let copied = async {
                let opened =
                    self.open(PATH, tour.door(), tokio_stream::once(v1::SnapshotRequest {}));
                let mut pieces = opened.await.map_err(Broken::Verdict)?;
                copy(self, &mut pieces, &mut out, &mut |copied| {
                    came = Instant::now();
                    progress(copied);
                })
                .await
            };
            let (why, asked_pause) = match copied.await {
                Ok(copied) => {
                    tour.answered();
                    return Ok((out, copied));
                }
                Err(Broken::Write(error)) => return Err(error.into()),
                Err(Broken::Verdict(Verdict::Refused(refused))) => {
                    return Err(ClientError::Refused(refused).into());
                }
                Err(Broken::Verdict(Verdict::NotDone { why, pause })) => (why, pause),
                Err(Broken::Verdict(Verdict::Doubtful { why })) => (why, None),
            };
            let left = self.timeout.saturating_sub(came.elapsed());
            if left.is_zero() {
                let (why, overloaded) = (by(tour.door(), why), asked_pause.is_some());
                return Err(ClientError::Unavailable { why, overloaded }.into());
            }
            let pause = tour.move_on(asked_pause);
            sleep(pause.min(left)).await;
        }
    }
}

async fn copy<W: Write>(
    client: &Client,
    pieces: &mut Streaming<v1::SnapshotChunk>,
    out: &mut W,
    progress: &mut impl FnMut(Copied),
) -> Result<Copied, Broken> {
    let mut copied = Copied::default();
    loop {
        let piece = timeout(client.timeout, pieces.message()).await.map_err(|_| {
            let why = format!("nothing came for {} ms", client.timeout.as_millis());
            Broken::Verdict(Verdict::Doubtful { why })
        })?;
        let Some(piece) = piece.map_err(|status| Broken::Verdict(judge(status)))? else {
            return Ok(copied);
        };
        let v1::SnapshotChunk { data, revision, allocations, workers } = piece;
        if revision > 0 || allocations > 0 || workers > 0 {
            (copied.revision, copied.allocations, copied.workers) =
                (revision, allocations, workers);
        }
        out.write_all(&data).map_err(Broken::Write)?;
        copied.bytes += data.len() as u64;
        progress(copied);
    }
}
