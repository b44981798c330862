//! After a warm-up a decode step touches no page for the first time: nothing large is allocated, nothing is left to be
//! made when it is needed. The only test of its process: it counts the faults of the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_kernels::{BLOCK_TOKENS, Isa, Kernels, RowContext};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{
    KvCache, ModelConfig, NoHeadRanks, RankSlice, SingleRank, StageInput, StageModel, Workspace,
};
use ashlar_vocabulary::{BlockId, FloatType, Quantization, TokenId};
use std::path::Path;
use std::sync::Arc;

/// Contexts of several splits, whose partial results are merged.
const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "intermediate_size":768,"num_hidden_layers":3,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":32,
    "vocab_size":384,"max_position_embeddings":2048,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "tie_word_embeddings":false}"#;
const PROMPT: usize = 800;
const TOKENS_MAX: usize = 1200;
const STEPS: usize = 40;
/// The system may fault on its own account (moving pages, say), but hardly in every round.
const ROUNDS: usize = 6;

/// Page faults of this process so far, those that read from a disk included.
fn page_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // After the name, which may hold anything, come the state (field 3) and so on: minor faults are 10, major ones 12.
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap().split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    fields[10 - 3] + fields[12 - 3]
}

struct Decoder {
    model: StageModel,
    cache: KvCache,
    work: Workspace,
    table: Vec<BlockId>,
    position: usize,
    token: TokenId,
}

impl Decoder {
    fn new(directory: &Path, quantization: Option<Quantization>) -> Decoder {
        let shape = ModelConfig::open(directory, quantization).unwrap().shape;
        let kernels = Arc::new(Kernels::new(Isa::best(), 2));
        let slice = RankSlice::whole(&shape);
        let model = StageModel::load(directory, quantization, slice, kernels, &mut |_, _| {}).unwrap();
        let blocks = TOKENS_MAX.div_ceil(BLOCK_TOKENS);
        let table = (0..blocks as u32).map(BlockId).collect();
        Decoder {
            cache: model.kv_cache(blocks),
            work: model.workspace(PROMPT),
            model,
            table,
            position: 0,
            token: 1,
        }
    }

    /// Computes `tokens` and chooses the next one.
    fn step(&mut self, tokens: &[TokenId]) {
        let Decoder { model, cache, work, table, .. } = self;
        let end = self.position + tokens.len();
        let rows: Vec<RowContext<'_>> = (self.position..end)
            .map(|position| RowContext { position: position as u32, block_table: table })
            .collect();
        let input = StageInput::Tokens(tokens);
        model.forward(&rows, input, cache, &mut SingleRank, work, &mut || {}).unwrap();
        let logits =
            model.logits(&[tokens.len() - 1], &mut SingleRank, &mut NoHeadRanks, work).unwrap().unwrap();
        let (best, _) = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        (self.position, self.token) = (end, best as TokenId);
    }

    fn decode(&mut self, steps: usize) {
        (0..steps).for_each(|_| self.step(&[self.token]));
    }

    fn prefill(&mut self) {
        let prompt: Vec<TokenId> = (0..PROMPT as TokenId).map(|i| i * 53 % 384).collect();
        self.position = 0;
        self.step(&prompt);
    }
}

#[test]
fn decode_steps_fault_no_page_after_a_warm_up() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("shape.json");
    std::fs::write(&config, CONFIG).unwrap();
    let shape = config.to_string_lossy().into_owned();
    let request = SynthRequest { shape, dtype: FloatType::F32, seed: 5, tokenizer: None };
    synthesize(directory.path(), &request, &mut |_, _| {}).unwrap();
    for quantization in [None, Some("bf16"), Some("q4_k_m")] {
        let quantization = quantization.map(|name| name.parse().unwrap());
        let mut decoder = Decoder::new(directory.path(), quantization);
        // A first sequence brings the cache's blocks into memory; the next ones use them again.
        decoder.prefill();
        decoder.decode(TOKENS_MAX - PROMPT);
        let mut faults = Vec::new();
        for _ in 0..ROUNDS {
            decoder.prefill();
            decoder.decode(2);
            let before = page_faults();
            decoder.decode(STEPS);
            faults.push(page_faults() - before);
            if faults.last() == Some(&0) {
                break;
            }
        }
        println!("{quantization:?}: {faults:?}");
        assert_eq!(
            faults.last(),
            Some(&0),
            "{quantization:?}: page faults of {STEPS} decode steps, round by round: {faults:?}"
        );
    }
}
