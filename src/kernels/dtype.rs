//! Number formats of stored weights. Products widen them to `f32`, which is exact, and accumulate
//! in `f32`: a format changes what the weights are, never how they are summed.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// How weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    #[default]
    F32,
    /// The upper half of single precision: its range, 8 bits of precision.
    Bf16,
    /// IEEE half precision: 11 bits of precision, largest value 65504.
    F16,
}

impl Dtype {
    /// All formats.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Name in a config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The format of that name in a config.json.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Rounds values to the nearest numbers of this format, ties to even.
    pub fn round(self, values: &mut [f32]) {
        fn through<T: Element>(values: &mut [f32]) {
            let mut stored = [T::default(); 64];
            for values in values.chunks_mut(64) {
                T::narrow(values, &mut stored[..values.len()]);
                T::widen(&stored[..values.len()], values);
            }
        }
        match self {
            Self::F32 => {}
            Self::Bf16 => through::<bf16>(values),
            Self::F16 => through::<f16>(values),
        }
    }

    /// Appends values in this format, little-endian.
    pub fn write(self, values: &[f32], bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Self::Bf16 => bytes.extend(values.iter().flat_map(|value| bf16_of(*value).to_le_bytes())),
            Self::F16 => bytes.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
        }
    }

    /// Reads little-endian values of this format.
    ///
    /// # Panics
    /// When `bytes` are not those of `values.len()` numbers.
    pub fn read(self, bytes: &[u8], values: &mut [f32]) {
        assert_eq!(bytes.len(), values.len() * self.bytes(), "number of bytes");
        match self {
            Self::F32 => {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            Self::Bf16 => {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            Self::F16 => {
                let mut stored = [f16::ZERO; 64];
                for (values, bytes) in values.chunks_mut(64).zip(bytes.chunks(128)) {
                    for (stored, bytes) in stored.iter_mut().zip(bytes.as_chunks().0) {
                        *stored = f16::from_le_bytes(*bytes);
                    }
                    f16::widen(&stored[..values.len()], values);
                }
            }
        }
    }
}

/// How the products of a model are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Products {
    /// Both factors in f32: exactly what is stored.
    #[default]
    F32,
    /// Both factors rounded to bf16, which machines with `AVX512_BF16` multiply twice as fast.
    Bf16,
}

/// A number format as a Rust type.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// The nearest number, ties to even.
    fn narrow_one(value: f32) -> Self;
    /// The same value.
    fn widen_one(self) -> f32;
    /// [`Element::narrow_one`] of each of `from`.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// [`Element::widen_one`] of each of `from`.
    fn widen(from: &[Self], to: &mut [f32]);
    /// [`Element::widen_one`] of each of `from`, in `buffer` where they are of another format.
    fn widened<'a>(from: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..from.len()];
        Self::widen(from, buffer);
        buffer
    }
}

impl Element for f32 {
    #[inline(always)]
    fn narrow_one(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn widen_one(self) -> f32 {
        self
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn widened<'a>(from: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        from
    }
}

/// Rounds to nearest even without a branch, so that loops become vector code.
#[inline(always)]
fn bf16_of(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded })
}

impl Element for bf16 {
    #[inline(always)]
    fn narrow_one(value: f32) -> Self {
        bf16_of(value)
    }
    #[inline(always)]
    fn widen_one(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = bf16_of(*from));
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.widen_one());
    }
}

impl Element for f16 {
    #[inline(always)]
    fn narrow_one(value: f32) -> Self {
        Self::from_f32(value)
    }
    #[inline(always)]
    fn widen_one(self) -> f32 {
        self.to_f32()
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_library_does() {
        for bits in (0..u32::MAX).step_by(4099).chain([0x7f80_0000, 0x7f7f_ffff, 0x7f80_0001, 0x8000_0001]) {
            let value = f32::from_bits(bits);
            assert_eq!(bf16_of(value).to_bits(), bf16::from_f32(value).to_bits(), "{bits:x}");
        }
    }

    #[test]
    fn every_stored_number_survives_writing_and_reading() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let mut values = vec![0.0; 1 << 16];
            dtype.read(&bytes, &mut values);
            let mut rounded = values.clone();
            dtype.round(&mut rounded);
            let mut written = Vec::new();
            dtype.write(&values, &mut written);
            for (at, value) in values.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
                assert_eq!(written[2 * at..][..2], bytes[2 * at..][..2]);
                assert_eq!(value.to_bits(), rounded[at].to_bits());
            }
        }
    }
}
