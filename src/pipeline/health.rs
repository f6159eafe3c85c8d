//! Signs that the reinforcement stage cannot learn or has stopped thinking.

use super::error::PipelineError;
use crate::config::TrainConfig;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Steps that a judgement averages over.
const WINDOW: usize = 20;

/// Figures of one step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Vitals {
    /// Mean reward.
    pub reward: f64,
    /// Mean tokens of a thought.
    pub thought: f64,
    /// Share of groups whose rollouts all earned the same.
    pub uniform: f64,
}

/// Figures of the first and the last steps; part of the checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Health {
    first: Vec<Vitals>,
    last: VecDeque<Vitals>,
    warned: bool,
}

impl Health {
    /// The gate: refuses to start from too little skill.
    ///
    /// # Errors
    /// When reward or mixed groups of the first step are below the configured minimum.
    pub(super) fn check_start(vitals: Vitals, config: &TrainConfig) -> Result<(), PipelineError> {
        let mixed = 1.0 - vitals.uniform;
        let (min_reward, min_mixed) = (config.min_initial_reward, config.min_initial_mixed_groups);
        if vitals.reward >= f64::from(min_reward) && mixed >= f64::from(min_mixed) {
            return Ok(());
        }
        Err(PipelineError::TooLittleSkill {
            reward: vitals.reward,
            min_reward,
            mixed: 100.0 * mixed,
            min_mixed: 100.0 * f64::from(min_mixed),
        })
    }

    /// Takes in a step; names a collapse the first time that it is seen.
    pub(super) fn observe(&mut self, vitals: Vitals) -> Option<String> {
        if self.first.len() < WINDOW {
            self.first.push(vitals);
            return None;
        }
        self.last.push_back(vitals);
        if self.last.len() > WINDOW {
            self.last.pop_front();
        }
        let symptom = if self.last.len() == WINDOW { self.symptom() } else { None };
        let fresh = symptom.is_some() && !self.warned;
        self.warned |= fresh;
        symptom.filter(|_| fresh)
    }

    fn symptom(&self) -> Option<String> {
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / WINDOW as f64;
        let before = |field: fn(&Vitals) -> f64| mean(&mut self.first.iter().map(field));
        let now = |field: fn(&Vitals) -> f64| mean(&mut self.last.iter().map(field));
        let (thought_before, thought_now) = (before(|v| v.thought), now(|v| v.thought));
        let (reward_before, reward_now) = (before(|v| v.reward), now(|v| v.reward));
        if thought_before >= 0.5 && thought_now < 0.25 * thought_before && reward_now <= reward_before {
            return Some(format!(
                "thoughts shrank from {thought_before:.1} to {thought_now:.1} tokens while reward went from \
                 {reward_before:.3} to {reward_now:.3}"
            ));
        }
        let uniform = now(|v| v.uniform);
        (uniform > 0.98 && reward_now < 0.5 * reward_before).then(|| {
            format!(
                "{:.1} % of groups have no variance and reward fell from {reward_before:.3} to {reward_now:.3}",
                100.0 * uniform
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vitals(reward: f64, thought: f64, uniform: f64) -> Vitals {
        Vitals { reward, thought, uniform }
    }

    #[test]
    fn the_gate_names_what_is_missing() {
        let config = TrainConfig::default();
        assert!(Health::check_start(vitals(0.1, 4.0, 0.7), &config).is_ok());
        let error = Health::check_start(vitals(0.0, 4.0, 1.0), &config).unwrap_err();
        assert!(error.to_string().contains("mean reward of 0.0000"), "{error}");
        assert!(error.hint().is_some());
        assert!(Health::check_start(vitals(0.9, 4.0, 0.999), &config).is_err());
    }

    #[test]
    fn a_collapse_is_named_once_and_learning_is_not_one() {
        let mut health = Health::default();
        let feed = |health: &mut Health, v: Vitals| (0..WINDOW).filter_map(|_| health.observe(v)).count();
        assert_eq!(feed(&mut health, vitals(0.1, 4.0, 0.7)), 0);
        assert_eq!(feed(&mut health.clone(), vitals(0.5, 0.2, 0.7)), 0);
        assert_eq!(feed(&mut health, vitals(0.1, 0.2, 0.7)), 1);
        assert_eq!(feed(&mut health, vitals(0.1, 0.2, 0.7)), 0);
    }
}
