//! What fine-tuning reads: uploaded examples, samples, adapters, checkpoints.

use super::weights::{MODEL_SHAPE, object_end, safetensors_file};
use super::{InputFile, LARGE, SMALL, model_texts, subject, texts, words};
use crate::mutate::{Corpus, Seed};
use crate::{Memory, Subject, Target};
use anyhow::{Context, Result};
use ashlar_dataset::{DatasetReader, DatasetWriter, Method, Options, Sample, TokenSequence, prepare};
use ashlar_gateway::trial::Trial;
use ashlar_model::adapter::LoraSpec;
use ashlar_model::peft::PeftAdapter;
use ashlar_model::{ModelConfig, RankSlice, Trained};
use ashlar_tokenizer::Tokenizer;
use ashlar_training::checkpoint::{Position, Restore, Shard};
use ashlar_vocabulary::JobId;
use serde_json::json;
use std::io::Cursor;
use std::path::Path;

pub(super) const SUPERVISED: Target = Target {
    name: "examples",
    about: "a training file of chats, completions and texts",
    memory: LARGE,
    open: supervised,
};

pub(super) const PREFERENCES: Target =
    Target { name: "preferences", about: "a training file of preferences", memory: LARGE, open: preferences };

pub(super) const SAMPLES: Target =
    Target { name: "samples", about: "a job's samples, as nodes read them", memory: SMALL, open: samples };

pub(super) const ADAPTER: Target = Target {
    name: "adapter",
    about: "an adapter in PEFT's files, as nodes read it",
    memory: SMALL,
    open: adapter,
};

pub(super) const ADAPTER_IMPORT: Target = Target {
    name: "adapter-import",
    about: "the same, as the gateway looks at it",
    memory: SMALL,
    open: adapter_import,
};

pub(super) const CHECKPOINT: Target = Target {
    name: "checkpoint",
    about: "a share of a job's training state",
    memory: Memory { fixed: 8 << 20, per_byte: 256 },
    open: checkpoint,
};

fn examples(directory: &Path, seeds: &[String], methods: &'static [Method]) -> Result<Subject> {
    let tokenizer = Tokenizer::from_dir(model_texts(directory)?)?;
    let own = "messages role content system user assistant tool tool_calls function name arguments weight prompt completion text input preferred_output non_preferred_output parallel_tool_calls tools type reasoning_content <|end|> <|user|> <think> </think> <tool_call> \u{feff} \r\n \n\n {} [] null \\ud800 \\u0000";
    let corpus = texts(seeds.iter().map(|text| Seed::json_lines(text)), own);
    Ok(subject(corpus, move |input| {
        let mut good = false;
        for method in methods {
            let options = Options { line_bytes_max: 64 << 10, ..Options::new(*method, 64) };
            let Ok(mut writer) = DatasetWriter::new(Vec::new(), *method) else { continue };
            let Ok(report) = prepare(Cursor::new(input), &tokenizer, &options, &mut writer) else { continue };
            good |= report.problems.total == 0 && report.samples > 0;
            let _ = (report.verdict(), report.verdict_as_validation());
        }
        good
    }))
}

fn supervised(directory: &Path) -> Result<Subject> {
    let chat = json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "b"}]});
    let tools = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "assistant", "content": "<think>t</think>b"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]});
    let lines = |line: serde_json::Value| format!("{line}\n{line}\n\n{line}");
    let seeds = [
        lines(chat),
        lines(tools),
        lines(json!({"prompt": "p", "completion": " c"})),
        lines(json!({"text": "t \u{e9}"})),
    ];
    examples(directory, &seeds, &[Method::Supervised])
}

fn preferences(directory: &Path) -> Result<Subject> {
    let line = json!({"input": {"messages": [{"role": "user", "content": "q"}], "tools": [], "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "a"}], "non_preferred_output": [{"role": "assistant", "content": "b"}]});
    examples(directory, &[format!("{line}\n{line}\n")], &[Method::Dpo])
}

fn samples(_: &Path) -> Result<Subject> {
    let sample = |example: u32, length: u32| -> Result<Sample> {
        let tokens = (0..length).collect();
        let sequence =
            TokenSequence::new(tokens, vec![1..length / 2, length / 2 + 1..length]).context("a sequence")?;
        Ok(Sample { example, sequences: vec![sequence.clone(), sequence] })
    };
    let file = |method| -> Result<Vec<u8>> {
        let mut writer = DatasetWriter::new(Vec::new(), method)?;
        for (example, length) in [(0, 8), (1, 20), (2, 9)] {
            writer.push(&sample(example, length)?)?;
        }
        Ok(writer.finish()?.0)
    };
    let seeds = vec![Seed::from(file(Method::Dpo)?)];
    Ok(subject(
        Corpus { seeds, words: Vec::new(), repair: Some(repair_samples), ..Corpus::default() },
        |input| {
            let Ok(mut reader) = DatasetReader::open(Cursor::new(input)) else { return false };
            let samples = reader.sizes().len().min(64) as u32;
            (0..samples).all(|index| reader.read(index).is_ok())
        },
    ))
}

/// Bytes of an index entry, of the trailer, and of the header.
const INDEX_ENTRY: usize = 20;
const TRAILER: usize = 24;
const HEADER: usize = 16;

/// The checksums of the index and of the records, and where the index begins.
fn repair_samples(bytes: &mut [u8]) {
    let Some(trailer) = bytes.len().checked_sub(TRAILER).filter(|at| *at >= HEADER) else { return };
    let number = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
    };
    let samples = number(bytes, trailer + 8).min((trailer - HEADER) / INDEX_ENTRY);
    let index = trailer - samples * INDEX_ENTRY;
    bytes[trailer..trailer + 8].copy_from_slice(&(index as u64).to_le_bytes());
    bytes[trailer + 8..trailer + 12].copy_from_slice(&(samples as u32).to_le_bytes());
    let mut begin = HEADER;
    for sample in 0..samples {
        let end = number(bytes, index + sample * INDEX_ENTRY);
        if let Some(body) = end.checked_sub(4).filter(|body| *body >= begin && end <= index) {
            let checksum = crc32fast::hash(&bytes[begin..body]);
            bytes[body..end].copy_from_slice(&checksum.to_le_bytes());
        }
        begin = end;
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..HEADER]);
    hasher.update(&bytes[index..trailer]);
    bytes[trailer + 12..trailer + 16].copy_from_slice(&hasher.finalize().to_le_bytes());
}

/// Both files of an adapter as one input: the configuration's length, the configuration, the tensors.
fn adapter_input(config: &str, tensors: &Seed) -> Seed {
    let mut bytes = (config.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(config.as_bytes());
    let at = bytes.len();
    bytes.extend_from_slice(&tensors.bytes);
    let header = &tensors.json[0];
    Seed { bytes, json: vec![4..at, at + header.start..at + header.end] }
}

fn both_files(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = input.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

/// Both lengths, as the JSON behind them says.
fn repair_adapter(bytes: &mut [u8]) {
    let Some(config) = object_end(bytes, 4) else { return };
    bytes[..4].copy_from_slice(&(config as u32 - 4).to_le_bytes());
    if let Some(header) = object_end(bytes, config + 8) {
        let length = (header - config - 8) as u64;
        bytes[config..config + 8].copy_from_slice(&length.to_le_bytes());
    }
}

fn adapter_corpus() -> Corpus {
    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"], "lora_dropout": 0.0, "bias": "none", "use_rslora": false, "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}}).to_string();
    let name = |half: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight");
    let header = json!({name("A"): {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]}, name("B"): {"dtype": "F32", "shape": [32, 2], "data_offsets": [256, 512]}}).to_string();
    let mut tensors = safetensors_file(&header, 512);
    // An adapter without effect is refused.
    if let Some(last) = tensors.bytes.last_mut() {
        *last = 0x3f;
    }
    let own = words(
        "LORA IA3 r lora_alpha use_rslora use_dora fan_in_fan_out lora_bias bias all modules_to_save rank_pattern alpha_pattern F32 F16 BF16 F64 U8 dtype shape data_offsets base_model.model.model.layers.0.mlp.down_proj.lora_A.weight base_model.model.model.layers.18446744073709551615.self_attn.q_proj.lora_A.weight 18446744073709551608 4096 4097",
    );
    Corpus {
        seeds: vec![adapter_input(&config, &tensors)],
        words: own,
        repair: Some(repair_adapter),
        ..Corpus::default()
    }
}

fn config_of_model(directory: &Path) -> Result<ModelConfig> {
    let file = directory.join("shape.json");
    std::fs::write(&file, MODEL_SHAPE)?;
    Ok(ModelConfig::from_file(&file)?)
}

fn adapter(directory: &Path) -> Result<Subject> {
    let shape = config_of_model(directory)?.shape;
    let slice = RankSlice::whole(&shape);
    Ok(subject(adapter_corpus(), move |input| {
        let Some((config, tensors)) = both_files(input) else { return false };
        let Ok(adapter) = PeftAdapter::parse_effective(config, tensors, &shape) else { return false };
        let _ = adapter.cut(&shape, &slice);
        true
    }))
}

fn adapter_import(directory: &Path) -> Result<Subject> {
    let trial = Trial::open(&model_texts(directory)?, &directory.join("blobs"))?;
    let root = directory.join("adapters");
    std::fs::create_dir_all(root.join("a"))?;
    let config = InputFile::new(&root.join("a"), "adapter_config.json")?;
    let tensors = InputFile::new(&root.join("a"), "adapter_model.safetensors")?;
    Ok(subject(adapter_corpus(), move |input| {
        let Some(files) = both_files(input) else {
            // Any text as a path: nothing outside of the root may be found.
            let path = String::from_utf8_lossy(input);
            return trial.adapter(&root, &path).is_ok();
        };
        config.put(files.0);
        tensors.put(files.1);
        trial.adapter(&root, "a").is_ok()
    }))
}

/// Which step of which job the checkpoints are of.
const AT: Position = Position { job: JobId(77), steps: 5 };

fn checkpoint(directory: &Path) -> Result<Subject> {
    let shape = config_of_model(directory)?.shape;
    let slice = RankSlice::whole(&shape);
    let target = ashlar_model::adapter::Target::Query;
    let spec = LoraSpec { rank: 1, alpha: 2.0, rank_stabilized: false, targets: vec![target] };
    let trained = Trained::Adapter(spec);
    let tensors: Vec<_> = trained
        .weights(&shape, &slice)
        .shares()
        .iter()
        .map(|share| json!({"name": share.name, "rows": share.rows, "columns": share.columns}))
        .collect();
    let numbers: usize =
        trained.weights(&shape, &slice).shares().iter().map(|share| share.shape[0] * share.shape[1]).sum();
    let header = json!({"job": AT.job.to_string(), "steps": AT.steps, "optimizer_steps": 5, "adapter": {"rank": 1, "alpha": 2.0, "rank_stabilized": false}, "tensors": tensors}).to_string();
    let mut bytes = b"ASHSTATE".to_vec();
    bytes.extend_from_slice(&2_u32.to_le_bytes());
    bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
    let begin = bytes.len();
    bytes.extend_from_slice(header.as_bytes());
    let seed = Seed {
        json: vec![begin..bytes.len(); 1],
        bytes: {
            bytes.resize(bytes.len() + 12 * numbers, 0);
            bytes
        },
    };
    let own = words(
        "job steps optimizer_steps adapter tensors name shape rows columns start end 18446744073709551615 4294967296 6148914691236517205",
    );
    Ok(subject(
        Corpus { seeds: vec![seed], words: own, repair: Some(repair_checkpoint), ..Corpus::default() },
        move |input| {
            let Ok(mut shard) = Shard::open(Cursor::new(input)) else { return false };
            let mut restore = Restore::new(&trained, &shape, &slice, AT);
            restore.take(&mut shard).is_ok() && restore.adapter(&shape).is_ok()
        },
    ))
}

fn repair_checkpoint(bytes: &mut [u8]) {
    if let Some(end) = object_end(bytes, 16) {
        bytes[12..16].copy_from_slice(&(end as u32 - 16).to_le_bytes());
    }
}
