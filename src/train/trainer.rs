//! The trainer: executes micro-batches and updates the decoder, on the CPU or on a CUDA device.

use super::batch::MicroBatch;
#[cfg(feature = "cuda")]
use super::device::DeviceTrainer;
use super::host::HostTrainer;
use super::loss::PolicyLoss;
use super::objective::{Objective, Totals};
use super::optimizer::{OptimizerError, ParameterGroup, ParameterKind};
use crate::config::OptimizerConfig;
use crate::model::{Decoder, ModelError, Role, on_device};
use crate::time::Time;
use std::borrow::Cow;
use std::ops::AddAssign;

/// Why an update did not happen.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The optimiser refused.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// Something that is only done on the CPU.
    #[error("{what} is not implemented on CUDA devices")]
    OnlyOnCpu {
        /// What.
        what: &'static str,
    },
    /// The loss is not a number.
    #[error("the loss of update {update} is {loss}: the update was not made")]
    NonFiniteLoss {
        /// Number of the update, from 0.
        update: u64,
        /// The loss.
        loss: f64,
    },
    /// An update would have left the weights infinite or not a number.
    #[error("update {update} left {count} weights that are not finite: it will not be committed")]
    NonFiniteWeights {
        /// Number of the update, from 0.
        update: u64,
        /// How many weights.
        count: usize,
    },
}

#[cfg(feature = "cuda")]
impl From<crate::cuda::CudaError> for TrainError {
    fn from(error: crate::cuda::CudaError) -> Self {
        Self::Model(error.into())
    }
}

impl TrainError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::Optimizer(error) => error.hint(),
            Self::OnlyOnCpu { .. } => Some("set model.device to \"cpu\", or leave it out; Muon also runs with optimizer.offload = true".into()),
            Self::NonFiniteLoss { .. } | Self::NonFiniteWeights { .. } => Some(
                "lower optimizer.learning_rate or raise optimizer.warmup_steps; a changed pipeline needs a directory of \
                 its own (--out)"
                    .into(),
            ),
        }
    }
}

/// What one update did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateStats {
    /// Sums over its targets.
    pub totals: Totals,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f32,
    /// How often it was begun again with smaller micro-batches, since a device's memory did not suffice.
    pub retries: u64,
    /// How long its parts took.
    pub times: UpdateTimes,
}

/// How long the parts of an update took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateTimes {
    /// Forward passes through the layers, and those of the reference model.
    pub forward: Time,
    /// Backward passes, with the head, whose forward pass goes along with them.
    pub backward: Time,
    /// The optimiser, with rounding and packing of the weights.
    pub optimizer: Time,
}

impl AddAssign for UpdateTimes {
    fn add_assign(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward += other.backward;
        self.optimizer += other.optimizer;
    }
}

/// What a checkpoint holds of a trainer.
#[derive(Debug)]
pub struct TrainerState<'a> {
    /// The parameters in full precision, laid out as [`Decoder::trainable`] says.
    pub parameters: Cow<'a, [f32]>,
    /// The optimiser's state by name, each as long as its parameter.
    pub optimizer: Vec<(String, Cow<'a, [f32]>)>,
    /// Updates made so far.
    pub updates: u64,
}

/// A decoder with its optimiser.
pub struct Trainer {
    decoder: Decoder,
    /// Bytes of activations that a step may hold. On the CPU micro-batches run by schedule (see
    /// [`Schedule`](crate::model::Schedule)), in parts of so many tokens as pay or of fewer that fit; where none fit, layers
    /// are computed again in the backward pass. A device does that first, and takes parts where it is not enough.
    /// `None` is 2 GiB on the CPU, and on a device half of what is free.
    pub activation_bytes: Option<u64>,
    place: Place,
}

/// Where parameters, gradients and the optimiser's state lie.
enum Place {
    Host(HostTrainer),
    #[cfg(feature = "cuda")]
    Device(DeviceTrainer),
}

impl Trainer {
    /// A trainer for a stage of `steps` updates.
    ///
    /// # Errors
    /// When the optimiser refuses the decoder's layout, or the decoder's device has no room.
    pub fn new(decoder: Decoder, config: &OptimizerConfig, steps: u64) -> Result<Self, TrainError> {
        let parameters = decoder.parameters();
        Self::resume(decoder, parameters, config, steps)
    }

    /// A trainer that goes on with parameters in full precision, of which the decoder's are rounded.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn resume(
        decoder: Decoder,
        parameters: Vec<f32>,
        config: &OptimizerConfig,
        steps: u64,
    ) -> Result<Self, TrainError> {
        let groups = parameter_groups(&decoder);
        let place = match decoder.on_device()? {
            None => Place::Host(HostTrainer::new(&decoder, parameters, groups, config, steps)?),
            Some(there) => on_device!(&**there, there => {
                let device = there.device();
                Place::Device(DeviceTrainer::new(device, &decoder, parameters, groups, config, steps)?)
            }),
        };
        Ok(Self { decoder, activation_bytes: None, place })
    }

    /// Gradient buffers for a number of parameters.
    pub fn gradient_buffers(parameters: usize) -> usize {
        HostTrainer::gradient_buffers(parameters)
    }

    /// The decoder as it is now; one on a device has its new weights there alone.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Gives the decoder back.
    ///
    /// # Errors
    /// When its device has failed.
    pub fn into_decoder(mut self) -> Result<Decoder, TrainError> {
        self.decoder.bring_back()?;
        Ok(self.decoder)
    }

    /// What a checkpoint holds.
    ///
    /// # Errors
    /// When the decoder's device has failed.
    pub fn state(&self) -> Result<TrainerState<'_>, TrainError> {
        match &self.place {
            Place::Host(host) => Ok(host.state()),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.state(),
        }
    }

    /// Restores the optimiser: `read` fills the state of each name, as [`Trainer::state`] lists them.
    ///
    /// # Errors
    /// Those of `read`, and when the decoder's device has failed.
    pub fn restore<E: From<TrainError>>(
        &mut self,
        updates: u64,
        mut read: impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        match &mut self.place {
            Place::Host(host) => host.restore(updates, &mut read),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.restore(updates, &mut read),
        }
    }

    /// One update from some micro-batches. On the CPU the result depends on the micro-batches alone, not on the number of
    /// threads.
    ///
    /// # Errors
    /// When the model cannot be run, or loss, gradient or weights are not finite. In the first
    /// two cases nothing has changed.
    pub fn update(
        &mut self,
        batches: &[MicroBatch],
        loss: &PolicyLoss,
        inverse_temperature: f32,
        reference: Option<&Decoder>,
    ) -> Result<UpdateStats, TrainError> {
        let objective = Objective { loss, inverse_temperature };
        let (decoder, bytes) = (&mut self.decoder, self.activation_bytes);
        match &mut self.place {
            Place::Host(host) => host.update(decoder, batches, objective, reference, bytes),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.update(decoder, batches, objective, reference, bytes),
        }
    }
}

fn parameter_groups(decoder: &Decoder) -> Vec<ParameterGroup> {
    let kind = |role| match role {
        Role::Matrix => ParameterKind::Matrix,
        Role::Embedding => ParameterKind::Embedding,
        Role::Norm | Role::Bias => ParameterKind::Vector,
    };
    decoder
        .trainable()
        .parameters()
        .iter()
        .map(|parameter| ParameterGroup {
            name: parameter.name.clone(),
            range: parameter.range.clone(),
            rows: parameter.rows,
            columns: parameter.columns,
            kind: kind(parameter.role),
        })
        .collect()
}
