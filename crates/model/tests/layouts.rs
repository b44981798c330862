//! The numeric contract through the whole model: the same bits for every cut, chunking, batch, thread count and
//! instruction set.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::Isa;
use ashlar_vocabulary::{HeadSlice, Quantization};
use common::{Grid, bits, goldens};

const MODELS: [&str; 4] = ["llama", "qwen2", "qwen3", "mistral"];

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 37 + 11) % 97).collect()
}

fn reference(name: &str) -> Vec<Vec<u32>> {
    Grid::whole(&goldens().join(name)).greedy(&prompt(37), 6).1.iter().map(|row| bits(row)).collect()
}

fn assert_same(name: &str, what: &str, mut grid: Grid) {
    let found: Vec<Vec<u32>> = grid.greedy(&prompt(37), 6).1.iter().map(|row| bits(row)).collect();
    assert!(found == reference(name), "{name}, {what}: logits differ in some bit");
}

#[test]
fn every_cut_gives_the_same_bits() {
    for name in MODELS {
        let directory = goldens().join(name);
        let shape = ashlar_model::ModelConfig::from_dir(&directory).unwrap().shape;
        for stages in [1, 2, 4] {
            for size in [1, 2, 4] {
                if stages > shape.num_layers || !shape.num_kv_heads.is_multiple_of(size) {
                    continue;
                }
                let grid = Grid::new(&directory, stages, size, Isa::best(), 1);
                assert_same(name, &format!("{stages} stages × {size} ranks"), grid);
            }
        }
    }
}

#[test]
fn a_head_spread_over_all_stages_gives_the_same_bits() {
    for name in MODELS {
        let directory = goldens().join(name);
        let shape = ashlar_model::ModelConfig::from_dir(&directory).unwrap().shape;
        let mut cuts = 0;
        for (stages, size) in [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2)] {
            let possible = HeadSlice::can_spread(&shape, stages, size);
            if !possible || stages > shape.num_layers || !shape.num_kv_heads.is_multiple_of(size) {
                continue;
            }
            cuts += 1;
            let grid = Grid::with_spread_head(&directory, None::<Quantization>, stages, size);
            assert_same(name, &format!("{stages} stages × {size} ranks, head on all"), grid);
        }
        assert!(cuts >= 2, "{name}");
    }
}

#[test]
fn slices_of_a_spread_head_hold_what_the_whole_head_holds() {
    for name in MODELS {
        let directory = goldens().join(name);
        let whole = Grid::new(&directory, 2, 1, Isa::best(), 1).weight_bytes();
        let spread = Grid::with_spread_head(&directory, None::<Quantization>, 2, 1).weight_bytes();
        // Panels of 64 outputs: each slice's last one may be padded.
        assert!(spread.abs_diff(whole) <= whole / 20, "{name}: {spread} instead of {whole}");
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_same_bits() {
    for name in MODELS {
        for isa in Isa::available() {
            for threads in 1..=4 {
                let grid = Grid::new(&goldens().join(name), 1, 1, isa, threads);
                assert_same(name, &format!("{isa}, {threads} threads"), grid);
            }
        }
    }
}

#[test]
fn any_chunking_of_the_prompt_gives_the_same_bits() {
    for name in MODELS {
        let directory = goldens().join(name);
        let expected = reference(name);
        for chunk in [1, 3, 7, 16, 36] {
            let mut grid = Grid::whole(&directory);
            let tokens = prompt(37);
            let mut sequence = grid.sequence(&tokens, 48);
            let mut found = Vec::new();
            while sequence.computed < tokens.len() {
                let count = chunk.min(tokens.len() - sequence.computed);
                found.extend(grid.step(&mut [(&mut sequence, count)]).iter().map(|row| bits(row)));
            }
            assert!(found == expected[..37], "{name}: chunks of {chunk}");
        }
    }
}

#[test]
fn a_sequence_alone_and_in_a_batch_gets_the_same_bits() {
    for name in MODELS {
        let expected = reference(name);
        let mut grid = Grid::whole(&goldens().join(name));
        let mut own = grid.sequence(&prompt(37), 48);
        let mut others: Vec<_> = (1..9).map(|i| grid.sequence(&prompt(5 * i), 64)).collect();
        let mut batch: Vec<_> = others.iter_mut().enumerate().map(|(i, s)| (s, 5 * (i + 1))).collect();
        batch.insert(3, (&mut own, 37));
        let before: usize = batch[..3].iter().map(|(_, count)| count).sum();
        let rows = grid.step(&mut batch);
        let found: Vec<_> = rows[before..before + 37].iter().map(|row| bits(row)).collect();
        assert!(found == expected[..37], "{name}");
    }
}
