//! GPUs through NVIDIA's management library, where a driver is. The library is loaded at run time: a
//! host without one has no GPUs that can be seen, and that is no error.
//!
//! Indexes are those of the library: in the order of the PCI bus, as with
//! `CUDA_DEVICE_ORDER=PCI_BUS_ID`.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use crate::proto::v1;

/// What an agent sees of GPUs.
pub trait Gpus: Send + Sync {
    /// All there are.
    fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String>;
    /// How many processes are on each.
    fn in_use(&self) -> Result<Vec<GpuSeen>, String>;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuSeen {
    pub index: u32,
    pub uuid: String,
    pub processes: u32,
}

/// A host without a driver, or one whose GPUs are none of the agent's business.
pub struct NoGpus;

impl Gpus for NoGpus {
    fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String> {
        Ok(Vec::new())
    }

    fn in_use(&self) -> Result<Vec<GpuSeen>, String> {
        Ok(Vec::new())
    }
}

/// The driver's; or why there is none.
pub fn driver() -> Result<Box<dyn Gpus>, String> {
    Ok(Box::new(Driver(Nvml::init().map_err(|e| e.to_string())?)))
}

struct Driver(Nvml);

impl Driver {
    fn each<T>(
        &self,
        look: impl Fn(u32, &nvml_wrapper::Device<'_>) -> Result<T, NvmlError>,
    ) -> Result<Vec<T>, String> {
        let Driver(nvml) = self;
        let look = |index| look(index, &nvml.device_by_index(index)?);
        let all = nvml.device_count().and_then(|count| (0..count).map(look).collect());
        all.map_err(|e| e.to_string())
    }
}

impl Gpus for Driver {
    fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String> {
        self.each(|index, device| {
            let memory = device.memory_info()?;
            Ok(v1::GpuSpec {
                index,
                uuid: device.uuid()?,
                model: device.name()?,
                // The driver keeps some of it for itself.
                memory_bytes: memory.total.saturating_sub(memory.reserved),
            })
        })
    }

    fn in_use(&self) -> Result<Vec<GpuSeen>, String> {
        self.each(|index, device| {
            let compute = device.running_compute_processes()?;
            let graphics = device.running_graphics_processes()?;
            let processes = u32::try_from(compute.len() + graphics.len()).unwrap_or(u32::MAX);
            Ok(GpuSeen { index, uuid: device.uuid()?, processes })
        })
    }
}
