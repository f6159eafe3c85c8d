//! The parameters in full precision and the optimiser's state: on the device, or in the machine's memory.

use super::super::machine::MachineStore;
use super::super::optimizer::{
    AdamwStep, ParameterGroup, ParameterKind, StepStats, check_layout, ema_name, locate_non_finite,
};
use super::super::schedule::learning_rate;
use super::super::trainer::{TrainError, TrainerState};
use crate::config::{OptimizerConfig, OptimizerKind};
use crate::cuda::optimizer::{self, AdamwState, Chunks, Clip};
use crate::cuda::{Buffer, Device, Slice, SliceMut};
use crate::model::Dtype;
use crate::model::device::{DeviceDecoder, Format};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;

/// Where what an update changes lies, and in what format.
pub(super) enum Store {
    Resident(Resident<f32>),
    /// With moments of bf16, which are rounded at random: to the nearest, small changes would be lost.
    ResidentBf16(Resident<bf16>),
    /// In the machine's memory: its processors make the update, and the weights go back to the device.
    Offloaded(MachineStore),
}

impl Store {
    pub(super) fn new(
        device: &Device,
        parameters: Vec<f32>,
        groups: Vec<ParameterGroup>,
        config: &OptimizerConfig,
        total_steps: u64,
    ) -> Result<Self, TrainError> {
        if config.offload {
            return Ok(Self::Offloaded(MachineStore::new(parameters, groups, config, total_steps)?));
        }
        if config.kind != OptimizerKind::Adamw {
            return Err(TrainError::OnlyOnCpu { what: "the optimiser Muon" });
        }
        match config.moments {
            Dtype::Bf16 => {
                Resident::new(device, &parameters, groups, config, total_steps).map(Self::ResidentBf16)
            }
            _ => Resident::new(device, &parameters, groups, config, total_steps).map(Self::Resident),
        }
    }

    /// Updates made so far.
    pub(super) fn updates(&self) -> u64 {
        match self {
            Self::Resident(store) => store.updates,
            Self::ResidentBf16(store) => store.updates,
            Self::Offloaded(store) => store.updates(),
        }
    }

    /// Moves the parameters by their gradients, and the decoder's weights with them.
    pub(super) fn step<T: Format>(
        &mut self,
        decoder: &mut DeviceDecoder<T>,
        gradients: &Buffer<f32>,
    ) -> Result<StepStats, TrainError> {
        match self {
            Self::Resident(store) => store.step(decoder, gradients),
            Self::ResidentBf16(store) => store.step(decoder, gradients),
            Self::Offloaded(store) => {
                let stats = store.step(&gradients.download()?)?;
                decoder.set_parameters(store.parameters())?;
                Ok(stats)
            }
        }
    }

    pub(super) fn state(&self) -> Result<TrainerState<'_>, TrainError> {
        match self {
            Self::Resident(store) => store.state(),
            Self::ResidentBf16(store) => store.state(),
            Self::Offloaded(store) => Ok(store.state()),
        }
    }

    pub(super) fn restore<E: From<TrainError>>(
        &mut self,
        updates: u64,
        read: &mut impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Resident(store) => store.restore(updates, read),
            Self::ResidentBf16(store) => store.restore(updates, read),
            Self::Offloaded(store) => store.restore(updates, read),
        }
    }
}

/// On the device, with moments in the format `M`.
pub(super) struct Resident<M> {
    device: Device,
    config: OptimizerConfig,
    groups: Vec<ParameterGroup>,
    total_steps: u64,
    updates: u64,
    chunks: Chunks,
    parameters: Buffer<f32>,
    first_moments: Buffer<M>,
    second_moments: Buffer<M>,
    /// A running average of the parameters, if one is kept.
    averages: Option<Buffer<f32>>,
}

impl<M: Format> Resident<M> {
    fn new(
        device: &Device,
        parameters: &[f32],
        groups: Vec<ParameterGroup>,
        config: &OptimizerConfig,
        total_steps: u64,
    ) -> Result<Self, TrainError> {
        check_layout(&groups)?;
        let averages = match config.ema_decay {
            0.0 => None,
            _ => Some(device.upload("the averages", parameters)?),
        };
        let part = |group: &ParameterGroup| (group.range.clone(), group.kind == ParameterKind::Matrix);
        Ok(Self {
            chunks: Chunks::new(device, &groups.iter().map(part).collect::<Vec<_>>())?,
            parameters: device.upload("the parameters", parameters)?,
            first_moments: device.zeroed("the first moments", parameters.len())?,
            second_moments: device.zeroed("the second moments", parameters.len())?,
            averages,
            device: device.clone(),
            config: config.clone(),
            groups,
            total_steps,
            updates: 0,
        })
    }

    fn step<T: Format>(
        &mut self,
        decoder: &mut DeviceDecoder<T>,
        gradients: &Buffer<f32>,
    ) -> Result<StepStats, TrainError> {
        let learning_rate = learning_rate(&self.config, self.updates, self.total_steps);
        let clip = optimizer::clip(&self.device, Slice::from(gradients), self.config.max_grad_norm)?;
        let figures = clip.read()?;
        if figures.refused {
            return Err(locate_non_finite(self.groups.iter(), &gradients.download()?, self.updates).into());
        }
        self.updates += 1;
        self.move_parameters(decoder, gradients, learning_rate, &clip)?;
        self.check_parameters()?;
        Ok(StepStats { gradient_norm: figures.norm, learning_rate, clipped: figures.scale < 1.0 })
    }

    fn move_parameters<T: Format>(
        &mut self,
        decoder: &mut DeviceDecoder<T>,
        gradients: &Buffer<f32>,
        learning_rate: f32,
        clip: &Clip,
    ) -> Result<(), TrainError> {
        let step = AdamwStep::new(&self.config, learning_rate, 1.0, self.updates).on_device(self.updates);
        let state = AdamwState::<T, M> {
            parameters: SliceMut::from(&mut self.parameters),
            first: SliceMut::from(&mut self.first_moments),
            second: SliceMut::from(&mut self.second_moments),
            weights: Some(SliceMut::from(decoder.weights_mut())),
            average: self.averages.as_mut().map(|averages| (SliceMut::from(averages), self.config.ema_decay)),
        };
        Ok(optimizer::adamw(&self.device, &self.chunks, &step, clip, Slice::from(gradients), state)?)
    }

    /// The sum of squares is finite when all parameters are.
    fn check_parameters(&self) -> Result<(), TrainError> {
        if !optimizer::clip(&self.device, Slice::from(&self.parameters), 0.0)?.read()?.refused {
            return Ok(());
        }
        let count = self.parameters.download()?.par_iter().filter(|value| !value.is_finite()).count();
        Err(TrainError::NonFiniteWeights { update: self.updates - 1, count })
    }

    fn state(&self) -> Result<TrainerState<'_>, TrainError> {
        let mut optimizer = Vec::with_capacity(2 * self.groups.len());
        for group in &self.groups {
            let parts = [("first_moment", &self.first_moments), ("second_moment", &self.second_moments)];
            for (part, moments) in parts {
                let values = moments.slice(group.range.clone())?.download()?;
                let values = values.into_iter().map(Format::widen).collect();
                optimizer.push((format!("{}.{part}", group.name), Cow::Owned(values)));
            }
            if let Some(averages) = &self.averages {
                let values = averages.slice(group.range.clone())?.download()?;
                optimizer.push((ema_name(&group.name), Cow::Owned(values)));
            }
        }
        let parameters = Cow::Owned(self.parameters.download()?);
        Ok(TrainerState { parameters, optimizer, updates: self.updates })
    }

    fn restore<E: From<TrainError>>(
        &mut self,
        updates: u64,
        read: &mut impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.updates = updates;
        for group in &self.groups {
            let mut values = vec![0.0; group.range.len()];
            let parts =
                [("first_moment", &mut self.first_moments), ("second_moment", &mut self.second_moments)];
            for (part, moments) in parts {
                read(&format!("{}.{part}", group.name), &mut values)?;
                let stored: Vec<M> = values.iter().map(|value| M::narrow(*value)).collect();
                let slice = moments.slice_mut(group.range.clone());
                slice.and_then(|mut slice| slice.upload(&stored)).map_err(TrainError::from)?;
            }
            if let Some(averages) = &mut self.averages {
                read(&ema_name(&group.name), &mut values)?;
                let slice = averages.slice_mut(group.range.clone());
                slice.and_then(|mut slice| slice.upload(&values)).map_err(TrainError::from)?;
            }
        }
        Ok(())
    }
}
