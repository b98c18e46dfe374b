//! GPUs through NVIDIA's management library, where a driver is. The library is loaded at run time: a
//! host without one has no GPUs that can be seen, and that is no error.
//!
//! A driver may come up after the agent, be loaded anew, fail for one GPU of many, or not answer at all.
//! So a look does without it after [`ANSWER_MAX`]; a GPU that it cannot tell of is left out, which proves
//! nothing; and after an error the library is opened anew, after that of one GPU within a minute.
//!
//! Indexes are those of the library: in the order of the PCI bus, as with
//! `CUDA_DEVICE_ORDER=PCI_BUS_ID`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use crate::lock::guard;
use crate::proto::v1;

/// How long a driver may take to answer: one that hangs does so for good, or until a reset.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// The same where its GPUs are listed, once: many of them take seconds to wake.
const INVENTORY_MAX: Duration = Duration::from_secs(60);

/// A library by which a GPU failed is opened anew, but no more often: that may take seconds.
const REOPEN_AFTER: Duration = Duration::from_secs(60);

/// What an agent sees of GPUs.
pub trait Gpus: Send + Sync {
    /// All there are; none without a driver.
    fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String>;
    /// How many processes are on each, as far as that can be told; and what cannot, in words.
    fn in_use(&self) -> (Vec<GpuSeen>, Option<String>);
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuSeen {
    pub index: u32,
    pub uuid: String,
    pub processes: u32,
}

/// A host whose GPUs are none of its caller's business.
pub struct NoGpus;

impl Gpus for NoGpus {
    fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String> {
        Ok(Vec::new())
    }

    fn in_use(&self) -> (Vec<GpuSeen>, Option<String>) {
        (Vec::new(), None)
    }
}

/// NVIDIA's, if there is one.
#[derive(Default)]
pub struct Driver {
    /// With when it was opened.
    library: Arc<Mutex<Option<(Nvml, Instant)>>>,
    asked: Asked,
}

/// What each GPU says, by its index.
type Each<T> = Vec<(u32, Result<T, NvmlError>)>;

impl Driver {
    /// Asks all; there are none where there is no driver.
    fn ask<T: Send + 'static>(
        &self,
        at_most: Duration,
        what: fn(&Nvml, u32) -> Result<T, NvmlError>,
    ) -> Result<Each<T>, String> {
        let library = self.library.clone();
        self.asked.within(at_most, move || {
            let mut open = guard(&library);
            let fresh = || Nvml::init().map(|nvml| (nvml, Instant::now()));
            let (nvml, since) = match open.take().map_or_else(fresh, Ok) {
                Err(NvmlError::LibloadingError(_) | NvmlError::DriverNotLoaded) => {
                    return Ok(Vec::new());
                }
                opened => opened.map_err(|error| error.to_string())?,
            };
            let count = nvml.device_count().map_err(|error| error.to_string())?;
            let answers: Vec<_> = (0..count).map(|index| (index, what(&nvml, index))).collect();
            if answers.iter().all(|(_, answer)| answer.is_ok()) || since.elapsed() < REOPEN_AFTER {
                *open = Some((nvml, since));
            }
            Ok(answers)
        })?
    }
}

impl Gpus for Driver {
    fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String> {
        let shown = self.ask(INVENTORY_MAX, spec)?.into_iter();
        let each = shown.map(|(index, spec)| spec.map_err(|why| format!("GPU {index}: {why}")));
        each.collect()
    }

    fn in_use(&self) -> (Vec<GpuSeen>, Option<String>) {
        let all = match self.ask(ANSWER_MAX, seen) {
            Ok(all) => all,
            Err(why) => return (Vec::new(), Some(format!("the driver of the GPUs: {why}"))),
        };
        let mut trouble = None;
        let told = all.into_iter().filter_map(|(index, seen)| {
            seen.map_err(|why| trouble = Some(format!("GPU {index}: {why}"))).ok()
        });
        (told.collect(), trouble)
    }
}

fn spec(nvml: &Nvml, index: u32) -> Result<v1::GpuSpec, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let memory = device.memory_info()?;
    Ok(v1::GpuSpec {
        index,
        uuid: device.uuid()?,
        model: device.name()?,
        // The driver keeps some of it for itself.
        memory_bytes: memory.total.saturating_sub(memory.reserved),
    })
}

fn seen(nvml: &Nvml, index: u32) -> Result<GpuSeen, NvmlError> {
    let device: Device<'_> = nvml.device_by_index(index)?;
    let compute = device.running_compute_processes()?;
    let graphics = device.running_graphics_processes()?;
    let processes = u32::try_from(compute.len() + graphics.len()).unwrap_or(u32::MAX);
    Ok(GpuSeen { index, uuid: device.uuid()?, processes })
}

/// Asks what may never answer. One question is under way at a time, on a thread of its own: what hangs
/// costs one thread, however often it is asked.
#[derive(Default)]
struct Asked {
    under_way: Arc<AtomicBool>,
}

impl Asked {
    fn within<T: Send + 'static>(
        &self,
        at_most: Duration,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let under_way = UnderWay::begin(&self.under_way).ok_or("it has not answered yet")?;
        let (answer, answered) = sync_channel(1);
        let asked = thread::Builder::new().name("gpus".into()).spawn(move || {
            let answered = question();
            drop(under_way);
            let _ = answer.send(answered); // nobody may wait any more
        });
        asked.map_err(|error| format!("it cannot be asked: {error}"))?;
        answered.recv_timeout(at_most).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("no answer within {at_most:?}"),
            RecvTimeoutError::Disconnected => "the question panicked".into(),
        })
    }
}

/// Until it is dropped.
struct UnderWay(Arc<AtomicBool>);

impl UnderWay {
    fn begin(flag: &Arc<AtomicBool>) -> Option<Self> {
        (!flag.swap(true, Ordering::AcqRel)).then(|| UnderWay(flag.clone()))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_hangs_is_given_up_and_asked_again_once_it_has_answered() {
        let asked = Asked::default();
        assert_eq!(asked.within(LONG, || 7), Ok(7));
        let (end, ended) = channel::<()>();
        let hang = move || ended.recv().is_ok();
        assert!(asked.within(Duration::from_millis(1), hang).unwrap_err().contains("1ms"));
        assert!(asked.within(LONG, || 8).unwrap_err().contains("not answered yet"));
        end.send(()).unwrap();
        while asked.within(LONG, || 9) != Ok(9) {
            thread::yield_now();
        }
    }

    #[test]
    fn a_question_that_panics_is_no_answer() {
        let asked = Asked::default();
        let fault = asked.within(LONG, || -> u32 { panic!("a fault in the library") });
        assert_eq!(fault, Err("the question panicked".into()));
        assert_eq!(asked.within(LONG, || 9), Ok(9));
    }

    #[test]
    fn a_host_without_a_driver_shows_none_and_that_is_no_trouble() {
        let driver = Driver::default();
        if !std::path::Path::new("/dev/nvidiactl").exists() {
            assert_eq!(driver.inventory(), Ok(vec![]));
            assert_eq!(driver.in_use(), (vec![], None));
        }
    }
}
