//! Runs a model in process over any cut: stages one after the other, ranks of a group on threads of their own.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use ashlar_kernels::{BLOCK_TOKENS, Isa, Kernels, RowContext};
use ashlar_model::{
    Collective, CollectiveError, HeadError, HeadRanks, KvCache, LogitColumns, ModelConfig, NoHeadRanks,
    RankSlice, StageInput, StageModel, Workspace,
};
use ashlar_vocabulary::{BlockId, HeadSlice, LayerRange, Precision, Quantization, TokenId};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};

pub fn goldens() -> PathBuf {
    // From whichever package includes this file.
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    above.map(|folder| folder.join("crates/model/tests/goldens")).find(|path| path.is_dir()).unwrap()
}

/// A group of threads that exchange through shared memory.
pub struct ThreadGroup {
    rank: usize,
    barrier: Arc<Barrier>,
    slots: Arc<Vec<Mutex<Vec<f32>>>>,
}

impl ThreadGroup {
    pub fn of(size: usize) -> Vec<ThreadGroup> {
        let barrier = Arc::new(Barrier::new(size));
        let slots: Arc<Vec<_>> = Arc::new((0..size).map(|_| Mutex::default()).collect());
        (0..size).map(|rank| ThreadGroup { rank, barrier: barrier.clone(), slots: slots.clone() }).collect()
    }
}

impl Collective for ThreadGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.slots.len()
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        *self.slots[self.rank].lock().unwrap() = own.to_vec();
        self.barrier.wait();
        for (slot, out) in self.slots.iter().zip(all.chunks_exact_mut(own.len())) {
            out.copy_from_slice(&slot.lock().unwrap());
        }
        self.barrier.wait();
        Ok(())
    }

    fn gather(&mut self, own: &[f32], lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        *self.slots[self.rank].lock().unwrap() = own.to_vec();
        self.barrier.wait();
        if self.rank == 0 {
            let mut at = 0;
            for (slot, &length) in self.slots.iter().zip(lengths) {
                all[at..at + length].copy_from_slice(&slot.lock().unwrap());
                at += length;
            }
        }
        self.barrier.wait();
        Ok(())
    }
}

/// One rank of one stage.
struct Rank {
    model: StageModel,
    cache: KvCache,
    work: Workspace,
    group: ThreadGroup,
}

/// A whole model, cut.
pub struct Grid {
    pub config: ModelConfig,
    stages: Vec<Vec<Rank>>,
    next_block: u32,
    blocks: u32,
}

/// A sequence in a grid.
#[derive(Clone)]
pub struct Sequence {
    pub tokens: Vec<TokenId>,
    pub computed: usize,
    pub table: Vec<BlockId>,
}

const ROWS_MAX: usize = 256;

impl Grid {
    pub fn new(
        directory: &Path,
        stages: usize,
        tensor_parallel_size: usize,
        isa: Isa,
        threads: usize,
    ) -> Grid {
        Grid::quantized(directory, None::<Quantization>, stages, tensor_parallel_size, isa, threads)
    }

    pub fn quantized(
        directory: &Path,
        precision: impl Into<Precision>,
        stages: usize,
        tensor_parallel_size: usize,
        isa: Isa,
        threads: usize,
    ) -> Grid {
        let precision = precision.into();
        let config = ModelConfig::open(directory, precision).unwrap();
        Grid::of(config, stages, tensor_parallel_size, false, &|slice| {
            let kernels = Arc::new(Kernels::new(isa, threads));
            StageModel::load(directory, precision, slice, kernels, &mut |_, _| {}).unwrap()
        })
    }

    /// A head that every rank of every stage has a slice of.
    pub fn with_spread_head(
        directory: &Path,
        precision: impl Into<Precision>,
        stages: usize,
        ranks: usize,
    ) -> Grid {
        let precision = precision.into();
        let config = ModelConfig::open(directory, precision).unwrap();
        Grid::of(config, stages, ranks, true, &|slice| {
            let kernels = Arc::new(Kernels::new(Isa::best(), 1));
            StageModel::load(directory, precision, slice, kernels, &mut |_, _| {}).unwrap()
        })
    }

    /// Ranks that `load` loads.
    pub fn of(
        config: ModelConfig,
        stages: usize,
        tensor_parallel_size: usize,
        spread_head: bool,
        load: &dyn Fn(RankSlice) -> StageModel,
    ) -> Grid {
        let layers = config.shape.num_layers;
        let stages = (0..stages)
            .map(|stage| {
                let cut =
                    |rank| HeadSlice::of_rank(spread_head, (stage, stages), (rank, tensor_parallel_size));
                let range = LayerRange { start: stage * layers / stages, end: (stage + 1) * layers / stages };
                ThreadGroup::of(tensor_parallel_size)
                    .into_iter()
                    .map(|group| {
                        let slice = RankSlice {
                            layers: range,
                            first: stage == 0,
                            last: stage + 1 == stages,
                            tensor_rank: group.rank,
                            tensor_parallel_size,
                            head: cut(group.rank),
                        };
                        let model = load(slice);
                        Rank { cache: model.kv_cache(64), work: model.workspace(ROWS_MAX), model, group }
                    })
                    .collect()
            })
            .collect();
        Grid { config, stages, next_block: 0, blocks: 64 }
    }

    /// Weights that all ranks hold.
    pub fn weight_bytes(&self) -> u64 {
        self.stages.iter().flatten().map(|rank| rank.model.bytes().0).sum()
    }

    pub fn whole(directory: &Path) -> Grid {
        Grid::new(directory, 1, 1, Isa::best(), 1)
    }

    pub fn sequence(&mut self, tokens: &[TokenId], capacity: usize) -> Sequence {
        let count = capacity.div_ceil(BLOCK_TOKENS) as u32;
        assert!(self.next_block + count <= self.blocks, "the test's cache is too small");
        // Descending, so that neighbouring blocks of a sequence are not neighbours in memory.
        let top = self.blocks - self.next_block;
        self.next_block += count;
        Sequence {
            tokens: tokens.to_vec(),
            computed: 0,
            table: (0..count).map(|i| BlockId(top - 1 - i)).collect(),
        }
    }

    /// Computes the next `count` positions of each sequence in one step; logits of every computed row.
    pub fn step(&mut self, sequences: &mut [(&mut Sequence, usize)]) -> Vec<Vec<f32>> {
        let mut tokens = Vec::new();
        let mut contexts = Vec::new();
        for (sequence, count) in sequences.iter() {
            for position in sequence.computed..sequence.computed + count {
                tokens.push(sequence.tokens[position]);
                contexts.push(RowContext { position: position as u32, block_table: &sequence.table });
            }
        }
        let mut activations: Vec<f32> = Vec::new();
        let mut logits = Vec::new();
        let last = self.stages.len() - 1;
        for index in 0..self.stages.len() {
            let (earlier, from_here) = self.stages.split_at_mut(index);
            let (ranks, earlier) = (&mut from_here[0], &*earlier);
            let (tokens, contexts, input) = (&tokens, &contexts, &activations);
            let outputs: Vec<_> = std::thread::scope(|scope| {
                let running: Vec<_> = ranks
                    .iter_mut()
                    .map(|rank| {
                        scope.spawn(move || run_rank(rank, earlier, index == last, tokens, contexts, input))
                    })
                    .collect();
                running.into_iter().map(|handle| handle.join().unwrap()).collect()
            });
            for (other, _) in &outputs[1..] {
                assert_eq!(bits(other), bits(&outputs[0].0), "ranks of a group hold the same activations");
            }
            let (next, rows) = outputs.into_iter().next().unwrap();
            (activations, logits) = (next, rows);
        }
        for (sequence, count) in sequences {
            sequence.computed += *count;
        }
        logits
    }

    /// Greedy continuation; logits of every position along the way.
    pub fn greedy(&mut self, prompt: &[TokenId], count: usize) -> (Vec<TokenId>, Vec<Vec<f32>>) {
        let mut sequence = self.sequence(prompt, prompt.len() + count);
        let mut all = self.step(&mut [(&mut sequence, prompt.len())]);
        let mut generated = vec![argmax(all.last().unwrap())];
        while generated.len() < count {
            sequence.tokens.push(*generated.last().unwrap());
            let row = self.step(&mut [(&mut sequence, 1)]).pop().unwrap();
            generated.push(argmax(&row));
            all.push(row);
        }
        (generated, all)
    }
}

/// The ranks of earlier stages, asked one after the other.
struct EarlierRanks<'a> {
    stages: &'a [Vec<Rank>],
    rows: Vec<f32>,
}

impl HeadRanks for EarlierRanks<'_> {
    fn hand_out(&mut self, rows: &[f32]) -> Result<(), HeadError> {
        self.rows = rows.to_vec();
        Ok(())
    }

    fn collect(&mut self, index: usize, mut slice: LogitColumns<'_>) -> Result<(), HeadError> {
        let model = &self.stages.iter().flatten().nth(index).unwrap().model;
        assert_eq!(model.slice().head.unwrap().index, index);
        let mut values = vec![0.0; slice.rows() * slice.width()];
        model.head_slice(&self.rows, &mut values);
        slice.copy_from(&values);
        Ok(())
    }
}

fn run_rank(
    rank: &mut Rank,
    earlier: &[Vec<Rank>],
    last: bool,
    tokens: &[TokenId],
    contexts: &[RowContext<'_>],
    input: &[f32],
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let input = if earlier.is_empty() { StageInput::Tokens(tokens) } else { StageInput::Activations(input) };
    let Rank { model, cache, work, group } = rank;
    model.forward(contexts, input, cache, group, work, &mut || {}).unwrap();
    let activations = work.activations(tokens.len()).to_vec();
    let mut logits = Vec::new();
    let mut earlier = EarlierRanks { stages: earlier, rows: Vec::new() };
    let others: &mut dyn HeadRanks = if model.slice().head.is_some_and(|head| head.of > group.size()) {
        &mut earlier
    } else {
        &mut NoHeadRanks
    };
    if last {
        let rows: Vec<usize> = (0..tokens.len()).collect();
        for chunk in rows.chunks(ashlar_model::stage::LOGIT_ROWS_MAX) {
            if let Some(values) = model.logits(chunk, group, others, work).unwrap() {
                let vocab = model.config().shape.vocab_size;
                logits.extend(values.chunks_exact(vocab).map(<[f32]>::to_vec));
            }
        }
    }
    (activations, logits)
}

pub fn argmax(logits: &[f32]) -> TokenId {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&x| x == best).unwrap() as TokenId
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// max|Δ| / max|expected|.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let error = found.iter().zip(expected).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
    error / scale
}
