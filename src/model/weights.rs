//! A decoder's weights in its number format: matrices packed for products, vectors in `f32`.

use super::DecoderConfig;
use super::layout::{Matrix, Parameter, Place, Vector};
use crate::kernels::dtype::{Dtype, Products};
use crate::kernels::head::PackedHead;
use crate::kernels::packed::Packed;
use std::ops::{Index, IndexMut};

/// All weights; nothing else holds a copy of them.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    pub(super) dtype: Dtype,
    pub(super) products: Products,
    /// The embedding of an untied model; a tied one looks tokens up in its head.
    embedding: Option<PackedHead>,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) final_norm: Vec<f32>,
    pub(super) head: PackedHead,
}

/// One layer's weights, indexed by [`Matrix`] and [`Vector`].
#[derive(Clone, Debug)]
pub(super) struct LayerWeights {
    matrices: [Packed; 4],
    vectors: [Vec<f32>; 6],
}

impl Index<Matrix> for LayerWeights {
    type Output = Packed;
    fn index(&self, matrix: Matrix) -> &Packed {
        &self.matrices[matrix as usize]
    }
}

impl IndexMut<Matrix> for LayerWeights {
    fn index_mut(&mut self, matrix: Matrix) -> &mut Packed {
        &mut self.matrices[matrix as usize]
    }
}

impl Index<Vector> for LayerWeights {
    type Output = Vec<f32>;
    fn index(&self, vector: Vector) -> &Vec<f32> {
        &self.vectors[vector as usize]
    }
}

impl IndexMut<Vector> for LayerWeights {
    fn index_mut(&mut self, vector: Vector) -> &mut Vec<f32> {
        &mut self.vectors[vector as usize]
    }
}

impl LayerWeights {
    fn zeros(config: &DecoderConfig, dtype: Dtype) -> Self {
        let (hidden, inner, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (qkv, queries) = (config.qkv_width(), config.heads * dim);
        let vector = |length: usize, present: bool| vec![0.0; if present { length } else { 0 }];
        Self {
            matrices: [(hidden, qkv), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
                .map(|(inputs, outputs)| Packed::zeros(dtype, inputs, outputs)),
            vectors: [
                vector(hidden, true),
                vector(qkv, config.attention_bias),
                vector(dim, config.qk_norm),
                vector(dim, config.qk_norm),
                vector(hidden, config.output_bias()),
                vector(hidden, true),
            ],
        }
    }
}

impl Weights {
    /// All zeros.
    pub(super) fn zeros(config: &DecoderConfig, dtype: Dtype) -> Self {
        let entries = || PackedHead::zeros(dtype, config.vocab_size, config.hidden_size);
        Self {
            dtype,
            products: Products::default(),
            embedding: (!config.tied).then(entries),
            layers: (0..config.layers).map(|_| LayerWeights::zeros(config, dtype)).collect(),
            final_norm: vec![0.0; config.hidden_size],
            head: entries(),
        }
    }

    /// Changes how products with the matrices are computed.
    pub(super) fn set_products(&mut self, products: Products) {
        self.products = products;
        for matrix in self.layers.iter_mut().flat_map(|layer| &mut layer.matrices) {
            matrix.set_products(products);
        }
        self.head.set_products(products);
    }

    /// The embedding `[vocabulary, hidden]`.
    pub(super) fn embedding(&self) -> &PackedHead {
        self.embedding.as_ref().unwrap_or(&self.head)
    }

    /// Replaces rows of a parameter from `first` on, rounded to the format. Vectors are rounded too,
    /// though they are stored widened: what was evaluated is what an export holds.
    pub(super) fn set_rows(&mut self, parameter: &Parameter, first: usize, rows: &[f32]) {
        let dtype = self.dtype;
        let set_vector = |vector: &mut [f32]| {
            vector.copy_from_slice(rows);
            dtype.round(vector);
        };
        match parameter.place {
            Place::Embedding => self.embedding.as_mut().unwrap_or(&mut self.head).set_rows(first, rows),
            Place::Head => self.head.set_rows(first, rows),
            Place::FinalNorm => set_vector(&mut self.final_norm),
            Place::Matrix { layer, matrix, first: start } => {
                self.layers[layer][matrix].set_columns(start + first, rows);
            }
            Place::Vector { layer, vector, first } => {
                set_vector(&mut self.layers[layer][vector][first..][..rows.len()]);
            }
            Place::Adapter => {}
        }
    }

    /// Copies one row of a parameter, `[columns]`.
    pub(super) fn row(&self, parameter: &Parameter, row: usize, out: &mut [f32]) {
        match parameter.place {
            Place::Embedding => self.embedding().row(row, out),
            Place::Head => self.head.row(row, out),
            Place::FinalNorm => out.copy_from_slice(&self.final_norm),
            Place::Matrix { layer, matrix, first } => self.layers[layer][matrix].column(first + row, out),
            Place::Vector { layer, vector, first } => {
                out.copy_from_slice(&self.layers[layer][vector][first..][..parameter.columns]);
            }
            Place::Adapter => {}
        }
    }
}
