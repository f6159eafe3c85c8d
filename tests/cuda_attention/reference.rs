//! Attention and its gradients in f64, and forests to try them on.

use half::bf16;
use rpt::cuda::attention::{Attention, ForestInputs, ForestTables};
use rpt::cuda::forest::{ForestPlan, Planning};
use rpt::cuda::{Buffer, Device, Element, Slice, SliceMut};
use rpt::kernels::attention::Geometry;
use rpt::model::Forest;
use rpt::random::Stream;

/// A stored number that tests make and read.
pub(crate) trait Format: Element {
    fn of(value: f32) -> Self;
    fn value(self) -> f32;
    /// What an output may be off by, relative to what is usual.
    const OUT: f64;
    /// What a gradient may be off by.
    const GRADIENT: f64;
}
impl Format for f32 {
    fn of(value: f32) -> Self {
        value
    }
    fn value(self) -> f32 {
        self
    }
    const OUT: f64 = 1e-5;
    const GRADIENT: f64 = 1e-5;
}
impl Format for bf16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
    const OUT: f64 = 1.2e-2;
    const GRADIENT: f64 = 4e-2;
}

/// Numbers that T can hold.
pub(crate) fn numbers<T: Format>(seed: u64, count: usize) -> Vec<T> {
    let stream = Stream::new(seed, "attention tests");
    (0..count as u64).map(|at| T::of(stream.normal(at) as f32)).collect()
}

pub(crate) fn values<T: Format>(numbers: &[T]) -> Vec<f64> {
    numbers.iter().map(|number| f64::from(number.value())).collect()
}

/// Segments as (parent, length).
pub(crate) fn forest(segments: &[(Option<usize>, usize)]) -> Forest {
    let mut forest = Forest::default();
    for (parent, length) in segments {
        forest.add(*parent, &vec![0; *length]);
    }
    forest
}

/// Several trees with empty, short and long segments and a deep chain, of about `rows` rows.
pub(crate) fn random_forest(number: u64, rows: usize) -> Forest {
    let stream = Stream::new(number, "attention forests");
    let draw = |at: usize, bound: usize| stream.below(at as u64, bound as u64) as usize;
    let mut forest = Forest::default();
    let mut segment = 0;
    while forest.ids().len() < rows {
        let length = [0, 1, 2, 5, 9, 20, 65][draw(3 * segment, 7)];
        let parent = match draw(3 * segment + 1, 8) {
            _ if segment == 0 => None,
            0 => None,
            1..4 => Some(segment - 1),
            _ => Some(draw(3 * segment + 2, segment)),
        };
        forest.add(parent, &vec![0; length]);
        segment += 1;
    }
    forest
}

/// A forest in packed order with random queries, keys and values.
pub(crate) struct Problem<T> {
    pub(crate) geometry: Geometry,
    pub(crate) forest: Forest,
    /// For each packed row the packed rows that it sees, by walking up from its segment.
    pub(crate) visible: Vec<Vec<usize>>,
    pub(crate) qkv: Vec<T>,
}

pub(crate) fn geometry(heads: usize, kv_heads: usize, head_dim: usize) -> Geometry {
    Geometry { heads, kv_heads, head_dim }
}

impl<T: Format> Problem<T> {
    pub(crate) fn new(geometry: Geometry, forest: Forest, seed: u64) -> Self {
        let width = (geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim;
        let qkv = numbers(seed, forest.ids().len() * width);
        Self { geometry, visible: visible(&forest), forest, qkv }
    }

    pub(crate) fn rows(&self) -> usize {
        self.visible.len()
    }

    pub(crate) fn width(&self) -> usize {
        (self.geometry.heads + 2 * self.geometry.kv_heads) * self.geometry.head_dim
    }

    pub(crate) fn plan(&self, prefix: usize, batch_invariant: bool) -> ForestPlan {
        let kv_heads = self.geometry.kv_heads;
        ForestPlan::new(&self.forest, Planning { prefix, kv_heads, batch_invariant }).unwrap()
    }

    /// Query, key or value of a row and head; heads count through all three.
    fn head<'a>(&self, qkv: &'a [f64], row: usize, head: usize) -> &'a [f64] {
        &qkv[row * self.width() + head * self.geometry.head_dim..][..self.geometry.head_dim]
    }

    fn key_heads(&self, head: usize) -> (usize, usize) {
        let Geometry { heads, kv_heads, .. } = self.geometry;
        let key = heads + head / (heads / kv_heads);
        (key, key + kv_heads)
    }

    /// e^(score - log-sum) for each visible key, and the log-sum.
    fn probabilities(&self, qkv: &[f64], row: usize, head: usize) -> (Vec<f64>, f64) {
        let (key, _) = self.key_heads(head);
        let scale = 1.0 / (self.geometry.head_dim as f64).sqrt();
        let query = self.head(qkv, row, head);
        let scores: Vec<f64> =
            self.visible[row].iter().map(|at| dot(query, self.head(qkv, *at, key)) * scale).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = largest + scores.iter().map(|score| (score - largest).exp()).sum::<f64>().ln();
        (scores.iter().map(|score| (score - log_sum).exp()).collect(), log_sum)
    }

    /// Output `[rows, heads, head_dim]` and log-sums `[rows, heads]`.
    pub(crate) fn forward(&self, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut log_sums) = (Vec::new(), Vec::new());
        for row in 0..self.rows() {
            for head in 0..self.geometry.heads {
                let (weights, log_sum) = self.probabilities(qkv, row, head);
                let mut sum = vec![0.0; self.geometry.head_dim];
                for (weight, key) in weights.iter().zip(&self.visible[row]) {
                    add(&mut sum, *weight, self.head(qkv, *key, self.key_heads(head).1));
                }
                out.extend(sum);
                log_sums.push(log_sum);
            }
        }
        (out, log_sums)
    }

    /// Gradients of queries, keys and values, laid out as they are.
    pub(crate) fn backward(&self, qkv: &[f64], grad_out: &[f64]) -> Vec<f64> {
        let Geometry { heads, head_dim, .. } = self.geometry;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let (out, _) = self.forward(qkv);
        let mut gradients = vec![0.0; qkv.len()];
        for row in 0..self.rows() {
            for head in 0..heads {
                let place = (row * heads + head) * head_dim;
                let (out, grad) = (&out[place..][..head_dim], &grad_out[place..][..head_dim]);
                let delta = dot(out, grad);
                let (key, value) = self.key_heads(head);
                let (weights, _) = self.probabilities(qkv, row, head);
                for (weight, at) in weights.iter().zip(&self.visible[row]) {
                    let of_score = weight * (dot(grad, self.head(qkv, *at, value)) - delta) * scale;
                    let mut target = |row: usize, head: usize, factor: f64, source: &[f64]| {
                        add(
                            &mut gradients[row * self.width() + head * head_dim..][..head_dim],
                            factor,
                            source,
                        );
                    };
                    target(row, head, of_score, self.head(qkv, *at, key));
                    target(*at, key, of_score, self.head(qkv, row, head));
                    target(*at, value, *weight, grad);
                }
            }
        }
        gradients
    }

    /// The forward pass on the device.
    pub(crate) fn run(&self, device: &Device, batch_invariant: bool) -> Forward<T> {
        let tables = ForestTables::upload(device, &self.plan(0, batch_invariant)).unwrap();
        let attention = Attention::new(device, self.geometry, batch_invariant).unwrap();
        let qkv = device.upload("qkv", &self.qkv).unwrap();
        let inputs = ForestInputs { qkv: Slice::from(&qkv), prefix: None };
        Forward::new(device, &attention, &tables, &inputs, self.rows())
    }
}

/// What a forward pass leaves on the device.
pub(crate) struct Forward<T> {
    pub(crate) out: Buffer<T>,
    pub(crate) log_sums: Buffer<f32>,
}

impl<T: Format> Forward<T> {
    pub(crate) fn new(
        device: &Device,
        attention: &Attention,
        tables: &ForestTables,
        inputs: &ForestInputs<T>,
        rows: usize,
    ) -> Self {
        let geometry = attention.geometry();
        let mut out = device.allocate("out", rows * geometry.heads * geometry.head_dim).unwrap();
        let mut log_sums = device.allocate("log-sums", tables.statistics(geometry)).unwrap();
        let (to, sums) = (&mut SliceMut::from(&mut out), &mut SliceMut::from(&mut log_sums));
        attention.forest(tables, inputs, to, sums).unwrap();
        Self { out, log_sums }
    }
}

fn visible(forest: &Forest) -> Vec<Vec<usize>> {
    let plan = ForestPlan::new(forest, Planning { prefix: 0, kv_heads: 1, batch_invariant: false }).unwrap();
    let places = plan.packed.places();
    let mut all = vec![Vec::new(); places.len()];
    for segment in forest.segments() {
        for at in 0..segment.length {
            let mut seen = Vec::new();
            let (mut above, mut end) = (Some(segment), at + 1);
            while let Some(segment) = above {
                seen.extend((segment.row..segment.row + end).rev().map(|row| places[row] as usize));
                above = segment.parent.map(|parent| &forest.segments()[parent]);
                end = above.map_or(0, |parent| parent.length);
            }
            seen.reverse();
            all[places[segment.row + at] as usize] = seen;
        }
    }
    all
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [f64], factor: f64, values: &[f64]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
}

/// Whether every number is within `tolerance` of what it should be, relative to it and to the mean square.
pub(crate) fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let usual = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let bound = tolerance * (expected.abs() + usual);
        assert!(
            (found - expected).abs() <= bound,
            "{what}: {found} at {at} should be {expected} within {bound}"
        );
    }
}

pub(crate) fn bits<T: Format>(numbers: &[T]) -> Vec<u32> {
    numbers.iter().map(|number| number.value().to_bits()).collect()
}
