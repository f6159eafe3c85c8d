//! Rotary settings: both spellings of config.json, and the frequencies of each type.
//!
//! Formulas and the order of their roundings are those of `modeling_rope_utils.py` in transformers:
//! scalars are computed in `f64` and everything per pair of elements in `f32`.

use super::read::Reader;
use crate::kernels::rotary::Frequencies;
use crate::model::ModelError;
use serde_json::{Value, json};
use std::f64::consts::TAU;

/// How a rotary embedding is stretched past the positions of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency is divided by the factor.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// NTK-aware: the base grows with the sequence once that is longer than the model's positions.
    /// Such sequences are refused ([`ModelError::DynamicRotary`]); shorter ones are as by default.
    Dynamic {
        /// Stretch.
        factor: f64,
    },
    /// By parts of the spectrum, with a factor on the attention.
    Yarn(Yarn),
    /// By parts of the spectrum, as Llama 3.1.
    Llama3(Llama3),
}

/// Settings of `YaRN` (Peng et al., arXiv 2309.00071).
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Stretch.
    pub factor: f64,
    /// Positions of pre-training.
    pub original_positions: usize,
    /// Factor on cosines and sines; `None` derives it from `factor` and both `mscale`s.
    pub attention_factor: Option<f64>,
    /// Rotations over the original positions from which on a pair is not stretched.
    pub beta_fast: f64,
    /// Rotations up to which a pair is stretched fully.
    pub beta_slow: f64,
    /// Weight of the derived attention factor's numerator.
    pub mscale: Option<f64>,
    /// Weight of its denominator; used only where both are there.
    pub mscale_all_dim: Option<f64>,
    /// Round the ramp's ends to whole pairs.
    pub truncate: bool,
}

/// Settings of type `llama3`.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    /// Stretch of slow pairs.
    pub factor: f64,
    /// Pairs with fewer rotations over the original positions are stretched fully.
    pub low_freq_factor: f64,
    /// Pairs with more rotations are not stretched.
    pub high_freq_factor: f64,
    /// Positions of pre-training.
    pub original_positions: usize,
}

impl RopeScaling {
    /// Base and scaling from `rope_scaling` (which transformers prefers) or `rope_parameters`.
    pub(super) fn read(config: &Reader, max_positions: usize) -> Result<(f64, Self), ModelError> {
        let outer_theta = config.positive("rope_theta", Some(10_000.0))?;
        let settings = match config.object("rope_scaling")? {
            Some(settings) => settings,
            None => match config.object("rope_parameters")? {
                Some(settings) => settings,
                None => return Ok((outer_theta, Self::Default)),
            },
        };
        refuse_nested(&settings)?;
        settings.refuse_unless_one("partial_rotary_factor")?;
        let theta = settings.positive("rope_theta", Some(outer_theta))?;
        let original_positions = match config.present("original_max_position_embeddings") {
            Some(_) => config.size_or("original_max_position_embeddings", None)?,
            None => settings.size_or("original_max_position_embeddings", Some(max_positions))?,
        };
        let kind = settings.present("rope_type").or_else(|| settings.present("type"));
        let scaling = match kind.map_or(Some("default"), Value::as_str) {
            Some("default") => Self::Default,
            Some("linear") => Self::Linear { factor: settings.positive("factor", None)? },
            Some("dynamic") => Self::Dynamic { factor: settings.positive("factor", None)? },
            Some("yarn") => Self::Yarn(Yarn::read(&settings, original_positions, max_positions)?),
            Some("llama3") => Self::Llama3(Llama3::read(&settings, original_positions)?),
            _ => return Err(settings.unsupported(format!("rope_type {}", kind.unwrap_or(&Value::Null)))),
        };
        Ok((theta, scaling))
    }

    /// The settings as `rope_parameters` of config.json.
    pub(super) fn to_json(&self, theta: f64) -> Value {
        match self {
            Self::Default => json!({ "rope_type": "default", "rope_theta": theta }),
            Self::Linear { factor } => {
                json!({ "rope_type": "linear", "rope_theta": theta, "factor": factor })
            }
            Self::Dynamic { factor } => {
                json!({ "rope_type": "dynamic", "rope_theta": theta, "factor": factor })
            }
            Self::Yarn(yarn) => yarn.to_json(theta),
            Self::Llama3(llama3) => json!({
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": llama3.factor,
                "low_freq_factor": llama3.low_freq_factor,
                "high_freq_factor": llama3.high_freq_factor,
                "original_max_position_embeddings": llama3.original_positions,
            }),
        }
    }

    /// What a table of `positions` positions is made from.
    pub(super) fn frequencies(&self, theta: f64, head_dim: usize, positions: usize) -> Frequencies {
        let default = Frequencies::new(theta, head_dim);
        match self {
            Self::Default => default,
            Self::Linear { factor } => with_inverse(default, |inverse| inverse / *factor as f32),
            Self::Dynamic { factor } => {
                Frequencies::new(dynamic_base(theta, *factor, head_dim, positions), head_dim)
            }
            Self::Yarn(yarn) => yarn.frequencies(theta, head_dim),
            Self::Llama3(llama3) => with_inverse(default, |inverse| llama3.inverse(inverse)),
        }
    }
}

/// The base for a sequence of all `positions`: `theta`, but for the rounding of transformers.
fn dynamic_base(theta: f64, factor: f64, head_dim: usize, positions: usize) -> f64 {
    let (positions, dim) = (positions as f64, head_dim as f64);
    theta * (factor * positions / positions - (factor - 1.0)).powf(dim / (dim - 2.0))
}

/// Settings by layer or by section hold objects or lists; no type here reads any.
fn refuse_nested(settings: &Reader) -> Result<(), ModelError> {
    let mut fields = settings.fields().into_iter().flatten();
    match fields.find(|(_, value)| value.is_object() || value.is_array()) {
        Some((key, value)) => Err(settings.unsupported(format!("rotary setting {key} {value}"))),
        None => Ok(()),
    }
}

fn with_inverse(frequencies: Frequencies, change: impl Fn(f32) -> f32) -> Frequencies {
    Frequencies { inverse: frequencies.inverse.into_iter().map(change).collect(), ..frequencies }
}

impl Yarn {
    fn read(settings: &Reader, original_positions: usize, max_positions: usize) -> Result<Self, ModelError> {
        let nonzero = |key| settings.number(key).map(|number| number.filter(|number| *number != 0.0));
        let rotations = |key, default| match nonzero(key)? {
            Some(_) => settings.positive(key, None),
            None => Ok(default),
        };
        Ok(Self {
            factor: settings.positive("factor", Some(max_positions as f64 / original_positions as f64))?,
            original_positions,
            attention_factor: settings.number("attention_factor")?,
            beta_fast: rotations("beta_fast", 32.0)?,
            beta_slow: rotations("beta_slow", 1.0)?,
            mscale: nonzero("mscale")?,
            mscale_all_dim: nonzero("mscale_all_dim")?,
            truncate: settings.flag("truncate", true)?,
        })
    }

    fn to_json(&self, theta: f64) -> Value {
        let mut json = json!({
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_positions,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        });
        let optional = [
            ("attention_factor", self.attention_factor),
            ("mscale", self.mscale),
            ("mscale_all_dim", self.mscale_all_dim),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                json[key] = json!(value);
            }
        }
        json
    }

    fn frequencies(&self, theta: f64, head_dim: usize) -> Frequencies {
        let (low, high) = self.ramp(theta, head_dim as f64);
        let inverse = |(pair, power): (usize, f32)| {
            let stretched = (pair as f32 - low as f32) / (high - low) as f32;
            let kept = 1.0 - stretched.clamp(0.0, 1.0);
            (self.factor as f32 * power).recip() * (1.0 - kept) + power.recip() * kept
        };
        Frequencies {
            inverse: Frequencies::powers(theta, head_dim).enumerate().map(inverse).collect(),
            attention_factor: self.attention_factor() as f32,
        }
    }

    /// Pairs between which the stretch grows from none to full.
    fn ramp(&self, theta: f64, dim: f64) -> (f64, f64) {
        let pair = |rotations: f64| {
            dim * (self.original_positions as f64 / (rotations * TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // transformers widens an empty ramp so.
        if low == high { (low, high + 0.001) } else { (low, high) }
    }

    fn attention_factor(&self) -> f64 {
        let scale =
            |weight: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * self.factor.ln() + 1.0 };
        self.attention_factor.unwrap_or_else(|| match (self.mscale, self.mscale_all_dim) {
            (Some(numerator), Some(denominator)) => scale(numerator) / scale(denominator),
            _ => scale(1.0),
        })
    }
}

impl Llama3 {
    fn read(settings: &Reader, original_positions: usize) -> Result<Self, ModelError> {
        let llama3 = Self {
            factor: settings.positive("factor", None)?,
            low_freq_factor: settings.positive("low_freq_factor", None)?,
            high_freq_factor: settings.positive("high_freq_factor", None)?,
            original_positions,
        };
        if llama3.high_freq_factor > llama3.low_freq_factor {
            return Ok(llama3);
        }
        Err(settings.bad("`high_freq_factor` is not greater than `low_freq_factor`".into()))
    }

    fn inverse(&self, inverse: f32) -> f32 {
        let positions = self.original_positions as f64;
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        let wavelength = inverse.recip() * TAU as f32;
        if wavelength > (positions / low) as f32 {
            return inverse / self.factor as f32;
        }
        if wavelength < (positions / high) as f32 {
            return inverse;
        }
        let smooth = (wavelength.recip() * positions as f32 - low as f32) / (high - low) as f32;
        (1.0 - smooth) * inverse / self.factor as f32 + smooth * inverse
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rotations of a pair over some positions, in the words of the papers and in `f64`.
    fn rotations(theta: f64, pair: usize, dim: usize, positions: usize) -> f64 {
        positions as f64 * theta.powf(-(2.0 * pair as f64) / dim as f64) / TAU
    }

    fn stretches(scaling: &RopeScaling, theta: f64, dim: usize) -> Vec<f64> {
        let own = scaling.frequencies(theta, dim, 4096).inverse;
        let default = RopeScaling::Default.frequencies(theta, dim, 4096).inverse;
        default.iter().zip(own).map(|(default, own)| f64::from(default / own)).collect()
    }

    #[test]
    fn default_linear_and_dynamic_within_the_positions() {
        let close = |(a, b): (&f32, f64)| (f64::from(*a) / b - 1.0).abs() < 1e-6;
        let default = RopeScaling::Default.frequencies(1e6, 64, 4096).inverse;
        let expected = (0..32).map(|pair| 1e6_f64.powf(-f64::from(pair) / 32.0));
        assert!(default.iter().zip(expected).all(close));
        let dynamic = RopeScaling::Dynamic { factor: 2.0 };
        assert_eq!(dynamic.frequencies(1e6, 64, 4096).inverse, default);
        let linear = stretches(&RopeScaling::Linear { factor: 2.5 }, 1e6, 64);
        assert!(linear.iter().all(|stretch| (stretch - 2.5).abs() < 1e-5));
    }

    /// Equation of the Llama 3.1 release: the reciprocal of the stretch grows linearly with the
    /// rotations over the original positions, from 1 / factor at `low` to 1 at `high`.
    #[test]
    fn llama3_stretches_slow_pairs_only() {
        let (factor, low, high, original) = (8.0, 1.0, 4.0, 8192);
        let llama3 =
            Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_positions: original };
        for (pair, stretch) in stretches(&RopeScaling::Llama3(llama3), 5e5, 128).iter().enumerate() {
            let part = ((rotations(5e5, pair, 128, original) - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - part) / factor + part);
            assert!((stretch - expected).abs() < 1e-3, "{pair}: {stretch} {expected}");
        }
    }

    /// `YaRN`: pairs with more than `beta_fast` rotations keep their frequency, those with fewer than
    /// `beta_slow` are stretched fully, and the ramp between them is linear in the pair.
    #[test]
    fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
        let yarn = Yarn {
            factor: 4.0,
            original_positions: 4096,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: None,
            mscale_all_dim: None,
            truncate: false,
        };
        let factor = RopeScaling::Yarn(yarn.clone()).frequencies(1e4, 128, 4096).attention_factor;
        assert!((factor - 1.138_629_4).abs() < 1e-6);
        let shares: Vec<f64> = stretches(&RopeScaling::Yarn(yarn), 1e4, 128)
            .iter()
            .map(|stretch| (1.0 - 1.0 / stretch) / 0.75)
            .collect();
        let mut steps = Vec::new();
        for pair in 0..64 {
            let turns = rotations(1e4, pair, 128, 4096);
            let expected = if turns >= 32.0 { Some(0.0) } else { (turns <= 1.0).then_some(1.0) };
            assert!(expected.is_none_or(|share| (shares[pair] - share).abs() < 1e-5), "{pair} {shares:?}");
            if pair > 1 && shares[pair] < 0.9999 && shares[pair - 1] > 1e-4 {
                steps.push(shares[pair] - shares[pair - 1]);
            }
        }
        assert!(steps.len() > 10 && steps.iter().all(|step| (step - steps[0]).abs() < 1e-5), "{steps:?}");
    }
}
