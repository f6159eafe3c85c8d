//! A small matrix product on one thread.

const TILE_ROWS: usize = 4;
const TILE_COLUMNS: usize = 8;

/// Product of row-major matrices, `rows` x `inner` times `inner` x `columns`.
///
/// Every element is a sum over `inner` from first to last, whatever the shape, so the bits do not
/// depend on the tiles. Tiles are small enough for their sums to stay in registers.
pub(super) fn small_matmul(left: &[f32], right: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<f32> {
    let mut out = vec![0.0; rows * columns];
    let mut panel = vec![[0.0; TILE_COLUMNS]; inner];
    for column in (0..columns).step_by(TILE_COLUMNS) {
        let width = TILE_COLUMNS.min(columns - column);
        for (k, packed) in panel.iter_mut().enumerate() {
            packed[..width].copy_from_slice(&right[k * columns + column..][..width]);
        }
        for row in (0..rows).step_by(TILE_ROWS) {
            // Rows beyond the last repeat it; their sums are not stored.
            let lines = std::array::from_fn(|offset| &left[(row + offset).min(rows - 1) * inner..][..inner]);
            for (offset, sums) in multiply_tile(lines, &panel).iter().enumerate().take(rows - row) {
                out[(row + offset) * columns + column..][..width].copy_from_slice(&sums[..width]);
            }
        }
    }
    out
}

/// Four rows times a panel of eight columns.
fn multiply_tile(
    [first, second, third, fourth]: [&[f32]; TILE_ROWS],
    panel: &[[f32; TILE_COLUMNS]],
) -> [[f32; TILE_COLUMNS]; TILE_ROWS] {
    let mut sums = [[0.0; TILE_COLUMNS]; TILE_ROWS];
    let lines = first.iter().zip(second).zip(third).zip(fourth);
    for (packed, (((first, second), third), fourth)) in panel.iter().zip(lines) {
        for (sums, factor) in sums.iter_mut().zip([first, second, third, fourth]) {
            for (sum, value) in sums.iter_mut().zip(packed) {
                *sum += factor * value;
            }
        }
    }
    sums
}

/// The `columns` x `rows` transpose of a row-major `rows` x `columns` matrix.
pub(super) fn transpose(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), ..ProptestConfig::default() })]

        #[test]
        fn every_element_is_the_plain_sum(
            rows in 0_usize..11, inner in 0_usize..11, columns in 0_usize..19,
            values in prop::collection::vec(-2.0_f32..2.0, 300),
        ) {
            let (left, right) = (&values[..rows * inner], &values[100..][..inner * columns]);
            let product = small_matmul(left, right, [rows, inner, columns]);
            prop_assert_eq!(product.len(), rows * columns);
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                let sum = (0..inner).fold(0.0, |sum, k| sum + left[row * inner + k] * right[k * columns + column]);
                prop_assert_eq!(product[row * columns + column], sum);
            }
        }

        #[test]
        fn transposition_undoes_itself(rows in 1_usize..9, columns in 1_usize..9) {
            let matrix: Vec<f32> = (0..rows * columns).map(|index| index as f32).collect();
            let turned = transpose(&matrix, rows, columns);
            prop_assert_eq!(turned[(columns - 1) * rows], matrix[columns - 1]);
            prop_assert_eq!(transpose(&turned, columns, rows), matrix);
        }
    }
}
