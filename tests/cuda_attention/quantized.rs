//! Pages of eight-bit numbers.

use crate::cuda_emulator::device;
use crate::paged::{Layout, Paged, places};
use crate::reference::{Format, Problem, assert_close, geometry, random_forest, values};
use half::bf16;
use rpt::cuda::attention::Attention;
use rpt::cuda::paged::{Cut, PAGE, PagedPlan, PagedQuery};
use rpt::cuda::quantized::QuantizedPages;
use rpt::cuda::{Buffer, Device, Slice, SliceMut};
use rpt::kernels::attention::Geometry;

/// Sign, four bits of exponent, three of fraction.
fn e4m3(bits: u8) -> f64 {
    let (sign, exponent, fraction) = (bits >> 7, bits >> 3 & 15, f64::from(bits & 7));
    let size = match exponent {
        0 => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * 2f64.powi(i32::from(exponent) - 7),
    };
    if sign == 1 { -size } else { size }
}

struct Stored {
    keys: Buffer<u8>,
    values: Buffer<u8>,
    scales: (Buffer<f32>, Buffer<f32>),
}

impl Stored {
    /// Stores all rows in the rounds that `round` gives for (segment, offset).
    fn new<T: Format>(
        device: &Device,
        problem: &Problem<T>,
        layout: &Layout,
        round: impl Fn(usize, usize) -> usize,
    ) -> Self {
        let Geometry { kv_heads, head_dim, .. } = problem.geometry;
        let pages = layout.page_table.len() * kv_heads;
        let bytes = || device.upload("pages", &vec![0x55u8; pages * PAGE * head_dim]).unwrap();
        let scales = || device.upload("scales", &vec![f32::NAN; pages]).unwrap();
        let mut stored = Self { keys: bytes(), values: bytes(), scales: (scales(), scales()) };
        let attention = Attention::new(device, problem.geometry, false).unwrap();
        let qkv = device.upload("qkv", &problem.qkv).unwrap();
        for number in 0..3 {
            let mut slots = vec![-1; problem.rows()];
            for (segment, at, row) in places(problem) {
                if round(segment, at) == number {
                    slots[row] = layout.slot(segment, at) as i32;
                }
            }
            let slots = device.upload("slots", &slots).unwrap();
            let mut pages = QuantizedPages {
                keys: SliceMut::from(&mut stored.keys),
                values: SliceMut::from(&mut stored.values),
                key_scales: SliceMut::from(&mut stored.scales.0),
                value_scales: SliceMut::from(&mut stored.scales.1),
            };
            // SAFETY: slots come from the layout.
            unsafe { attention.store_quantized(Slice::from(&qkv), Slice::from(&slots), &mut pages) }.unwrap();
        }
        stored
    }

    /// Queries, keys and values with what the pages hold instead of the latter two, and the scale of each.
    fn read<T: Format>(&self, problem: &Problem<T>, layout: &Layout) -> (Vec<f64>, Vec<f64>) {
        let Geometry { heads, kv_heads, head_dim } = problem.geometry;
        let (mut qkv, mut scales) = (values(&problem.qkv), vec![0.0; problem.qkv.len()]);
        let operands = [(&self.keys, &self.scales.0), (&self.values, &self.scales.1)];
        for (operand, (pages, page_scales)) in operands.into_iter().enumerate() {
            let (pages, page_scales) = (pages.download().unwrap(), page_scales.download().unwrap());
            for (segment, at, row) in places(problem) {
                let slot = layout.slot(segment, at);
                for head in 0..kv_heads {
                    let page = slot / PAGE * kv_heads + head;
                    let scale = f64::from(page_scales[page]);
                    for element in 0..head_dim {
                        let to =
                            row * problem.width() + (heads + operand * kv_heads + head) * head_dim + element;
                        let byte = pages[(page * PAGE + slot % PAGE) * head_dim + element];
                        (qkv[to], scales[to]) = (e4m3(byte) * scale, scale);
                    }
                }
            }
        }
        (qkv, scales)
    }
}

/// Rows that grow louder, so that pages need larger scales as they fill.
fn crescendo<T: Format>(seed: u64) -> Problem<T> {
    let mut problem = Problem::<T>::new(geometry(4, 2, 32), random_forest(seed, 150), seed);
    let width = problem.width();
    for (row, values) in problem.qkv.chunks_exact_mut(width).enumerate() {
        let loud = 1.5f32.powi((row % 16) as i32 / 3);
        values[4 * 32..].iter_mut().for_each(|value| *value = T::of(value.value() * loud));
    }
    problem
}

fn rounds<T: Format>(at_once: bool, roundings: f64) {
    let problem = crescendo::<T>(70);
    let layout = Layout::new(&problem.forest);
    let round = |segment: usize, at: usize| if at_once { 0 } else { (at / 3 + segment % 2).min(2) };
    let (found, scales) = Stored::new(&device(), &problem, &layout, round).read(&problem, &layout);
    let kept = values(&problem.qkv);
    for (at, ((found, scale), value)) in found.iter().zip(&scales).zip(&kept).enumerate() {
        let bound = roundings * (value.abs() / 16.0).max(scale / 1024.0);
        assert!((found - value).abs() <= bound, "{found} at {at} should be {value} within {bound}");
    }
    // No page has a larger scale than twice what its largest number needs.
    let largest = kept.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    assert!(scales.iter().all(|scale| *scale <= 2.0 * largest / 448.0));
}

#[test]
fn numbers_are_rounded_to_the_nearest() {
    rounds::<f32>(true, 1.0);
    rounds::<bf16>(true, 1.0);
}

#[test]
fn a_growing_page_is_rounded_again_when_its_scale_grows() {
    rounds::<f32>(false, 2.0);
    rounds::<bf16>(false, 2.0);
}

#[test]
fn every_number_of_eight_bits_comes_back() {
    let device = device();
    let mut problem = Problem::<f32>::new(geometry(1, 1, 16), crate::reference::forest(&[(None, 16)]), 1);
    for (row, values) in problem.qkv.chunks_exact_mut(48).enumerate() {
        for (at, value) in values[16..32].iter_mut().enumerate() {
            let byte = (row * 16 + at) as u8;
            *value = if byte & 0x7f == 0x7f { 448.0 } else { e4m3(byte) as f32 };
        }
    }
    let layout = Layout::new(&problem.forest);
    let stored = Stored::new(&device, &problem, &layout, |_, _| 0);
    let keys = stored.keys.download().unwrap();
    assert_eq!(stored.scales.0.download().unwrap(), [1.0]);
    for (at, byte) in keys.iter().enumerate().filter(|(at, _)| at % 128 != 127) {
        assert_eq!(usize::from(*byte), at);
    }
}

#[test]
fn attention_reads_them_with_their_scales() {
    for (heads, kv_heads, dim) in [(4, 2, 32), (7, 1, 64), (2, 1, 80), (3, 1, 96), (2, 1, 128), (1, 1, 256)] {
        let problem = Problem::<bf16>::new(geometry(heads, kv_heads, dim), random_forest(80, 100), 3);
        let layout = Layout::new(&problem.forest);
        let device = device();
        let stored = Stored::new(&device, &problem, &layout, |_, at| (at / 6).min(2));
        let (qkv, _) = stored.read(&problem, &layout);
        let places = places(&problem);
        let queries: Vec<PagedQuery> = places
            .iter()
            .map(|(segment, at, row)| PagedQuery {
                row: *row,
                path: &layout.paths[*segment],
                visible: at + 1,
            })
            .collect();
        let plan =
            PagedPlan::new(&layout.segments, &queries, heads / kv_heads, Cut::Fast { keys: 256 }).unwrap();
        let bytes = [&stored.keys, &stored.values].map(|pages| pages.download().unwrap());
        let mut paged = Paged::<u8>::new(
            &device,
            problem.geometry,
            &plan,
            &layout.page_table,
            &problem.qkv,
            (&bytes[0], &bytes[1]),
        );
        paged.scales = Some(stored.scales);
        paged.launch().unwrap();
        let found = values(&paged.out.download().unwrap());
        assert_close(&found, &problem.forward(&qkv).0, bf16::OUT, &format!("{heads} {kv_heads} {dim}"));
    }
}
