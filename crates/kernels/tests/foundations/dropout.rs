//! Dropout.

use ashlar_kernels::{Dropout, DropoutRow, Isa, Kernels};
use ashlar_vocabulary::random::dropout_key;

fn rows(count: u32) -> Vec<DropoutRow> {
    (0..count).map(|row| DropoutRow { key: dropout_key(7, 3, row / 5, 0), position: row % 5 }).collect()
}

#[test]
fn a_share_is_zero_and_the_mean_stays() {
    let (kernels, rows) = (Kernels::new(Isa::best(), 2), rows(64));
    let share = 0.3;
    let dropout = Dropout {
        threshold: (share * 2_f64.powi(32)) as u32,
        factor: (1.0 / (1.0 - share)) as f32,
        rows: &rows,
        stream: 9,
        first: 0,
    };
    let x = vec![1.0; 64 * 256];
    let mut out = vec![f32::NAN; x.len()];
    kernels.drop_out(&dropout, 256, &x, &mut out);
    assert!(out.iter().all(|x| *x == 0.0 || *x == dropout.factor));
    let zeros = out.iter().filter(|x| **x == 0.0).count() as f64 / out.len() as f64;
    assert!((zeros - share).abs() < 0.01, "{zeros}");
    // Added to nothing it is the same, with the same elements.
    let mut sum = vec![0.0; x.len()];
    kernels.add_dropped(&dropout, 256, &x, &mut sum);
    assert_eq!(sum, out);
    let other = Dropout { stream: 10, ..dropout };
    kernels.drop_out(&other, 256, &x, &mut sum);
    assert_ne!(sum, out, "every layer has a mask of its own");
}

#[test]
fn neither_the_cut_of_rows_nor_that_of_columns_shows() {
    let (kernels, rows) = (Kernels::new(Isa::best(), 1), rows(11));
    let width = 37;
    let dropout = Dropout { threshold: 1 << 30, factor: 1.5, rows: &rows, stream: 2, first: 0 };
    let x: Vec<f32> = (0..11 * width).map(|i| i as f32 + 1.0).collect();
    let mut whole = vec![0.0; x.len()];
    kernels.drop_out(&dropout, width, &x, &mut whole);
    for (row, (x, whole)) in x.chunks(width).zip(whole.chunks(width)).enumerate() {
        for columns in [0..5, 5..6, 6..37] {
            let cut = Dropout { rows: &rows[row..row + 1], first: columns.start, ..dropout };
            let mut part = vec![0.0; columns.len()];
            kernels.drop_out(&cut, columns.len(), &x[columns.clone()], &mut part);
            assert_eq!(part, whole[columns]);
        }
    }
}

#[test]
fn what_is_dropped_is_zero_even_if_it_is_no_number() {
    let (kernels, rows) = (Kernels::new(Isa::best(), 1), rows(1));
    let dropout = Dropout { threshold: u32::MAX, factor: 2.0, rows: &rows, stream: 0, first: 0 };
    let mut out = [1.0; 3];
    kernels.drop_out(&dropout, 3, &[f32::NAN, f32::INFINITY, -1.0], &mut out);
    assert_eq!(out.map(f32::to_bits), [0; 3]);
}
