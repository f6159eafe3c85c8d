//! Where a decoder computes: on the CPU, or on a CUDA device that it is copied to when it is first needed there.

use super::{Decoder, ModelError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
pub use super::device::{DeviceSettings, OnDevice};

/// Settings of a device in a program without CUDA: there are none.
#[cfg(not(feature = "cuda"))]
#[derive(Clone, Debug)]
pub enum DeviceSettings {}

/// A decoder on a device in a program without CUDA: there is none.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
pub enum OnDevice {}

/// Evaluates an expression for the decoder on a device, whatever its number format.
#[cfg(feature = "cuda")]
macro_rules! on_device {
    ($decoder:expr, $name:ident => $body:expr) => {
        match $decoder {
            $crate::model::OnDevice::F32($name) => $body,
            $crate::model::OnDevice::Bf16($name) => $body,
        }
    };
}
#[cfg(not(feature = "cuda"))]
macro_rules! on_device {
    ($decoder:expr, $name:ident => $body:expr) => {
        match *$decoder {}
    };
}
pub(crate) use on_device;

/// The name of a device: `cpu`, `cuda`, or `cuda:1` for the second of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceName {
    /// The machine's processors.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => to.write_str("cpu"),
            Self::Cuda(0) => to.write_str("cuda"),
            Self::Cuda(number) => write!(to, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) => number.parse().map(Self::Cuda).map_err(|_| Self::refuse(name)),
            _ => Err(Self::refuse(name)),
        }
    }
}

impl DeviceName {
    fn refuse(name: &str) -> String {
        format!("{name:?} is no device: cpu, cuda and cuda:NUMBER are")
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.to_string()
    }
}

impl DeviceSettings {
    /// Opens a device; there is nothing to open for the CPU. With `batch_invariant` rows have the same bits in every batch,
    /// as they always have on the CPU.
    ///
    /// # Errors
    /// When there is no such device, or this program was built without CUDA.
    pub fn open(name: DeviceName, batch_invariant: bool) -> Result<Option<Self>, ModelError> {
        let DeviceName::Cuda(number) = name else { return Ok(None) };
        Self::open_cuda(number, batch_invariant).map(Some)
    }

    #[cfg(feature = "cuda")]
    fn open_cuda(number: usize, batch_invariant: bool) -> Result<Self, ModelError> {
        Ok(Self { device: crate::cuda::Device::open(number)?, batch_invariant })
    }

    #[cfg(not(feature = "cuda"))]
    fn open_cuda(_: usize, _: bool) -> Result<Self, ModelError> {
        Err(ModelError::NoCuda)
    }
}

/// Where one decoder computes.
#[derive(Clone, Debug, Default)]
pub(super) struct Placement {
    settings: Option<DeviceSettings>,
    /// The decoder on its device. Clones share it until one of them changes.
    there: OnceLock<Arc<OnDevice>>,
}

impl Placement {
    /// Forgets what is on the device, since the decoder has changed.
    pub(super) fn invalidate(&mut self) {
        self.there = OnceLock::new();
    }
}

impl Decoder {
    /// The same decoder, which computes on a device; `None` is the CPU.
    #[must_use]
    pub fn on(mut self, settings: Option<&DeviceSettings>) -> Self {
        self.placement = Placement { settings: settings.cloned(), there: OnceLock::new() };
        self
    }

    /// The decoder on its device, copied there when it is first asked for; `None` when it computes on the CPU.
    ///
    /// # Errors
    /// When the device has no kernels or no room for it.
    pub fn on_device(&self) -> Result<Option<&Arc<OnDevice>>, ModelError> {
        let Some(settings) = &self.placement.settings else { return Ok(None) };
        if let Some(there) = self.placement.there.get() {
            return Ok(Some(there));
        }
        let copy = copied_to(self, settings)?;
        Ok(Some(self.placement.there.get_or_init(|| Arc::new(copy))))
    }

    /// What is on the device, for the only one who changes it; whoever shares it keeps the old weights.
    ///
    /// # Errors
    /// As [`Decoder::on_device`].
    pub fn on_device_mut(&mut self) -> Result<Option<&mut OnDevice>, ModelError> {
        let Some(settings) = &self.placement.settings else { return Ok(None) };
        let there = match self.placement.there.take().map(Arc::try_unwrap) {
            None => copied_to(self, settings)?,
            Some(Ok(there)) => there,
            // Not from the weights here: those there may have been trained since.
            Some(Err(shared)) => duplicate(&shared)?,
        };
        self.placement.there = OnceLock::from(Arc::new(there));
        Ok(self.placement.there.get_mut().and_then(Arc::get_mut))
    }

    /// Takes over the weights that training left on the device.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn bring_back(&mut self) -> Result<(), ModelError> {
        let Some(there) = self.placement.there.get().cloned() else { return Ok(()) };
        on_device!(&*there, there => Ok(there.download(self)?))
    }
}

#[cfg(feature = "cuda")]
fn copied_to(decoder: &Decoder, settings: &DeviceSettings) -> Result<OnDevice, ModelError> {
    OnDevice::new(settings, decoder)
}

#[cfg(not(feature = "cuda"))]
fn copied_to(_: &Decoder, settings: &DeviceSettings) -> Result<OnDevice, ModelError> {
    match *settings {}
}

#[cfg(feature = "cuda")]
fn duplicate(there: &OnDevice) -> Result<OnDevice, ModelError> {
    Ok(match there {
        OnDevice::F32(there) => OnDevice::F32(there.duplicate()?),
        OnDevice::Bf16(there) => OnDevice::Bf16(there.duplicate()?),
    })
}

#[cfg(not(feature = "cuda"))]
fn duplicate(there: &OnDevice) -> Result<OnDevice, ModelError> {
    match *there {}
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_are_read_as_they_are_written() {
        for name in ["cpu", "cuda", "cuda:1", "cuda:12"] {
            assert_eq!(name.parse::<DeviceName>().unwrap().to_string(), name);
        }
        for name in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "cpu:0", "CUDA"] {
            assert!(name.parse::<DeviceName>().unwrap_err().contains("is no device"), "{name}");
        }
        assert!(DeviceSettings::open(DeviceName::Cpu, true).unwrap().is_none());
    }
}
