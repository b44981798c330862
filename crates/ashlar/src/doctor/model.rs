//! Whether a model is whole, supported, and small enough for this machine. Headers are read, not the weights.

use crate::findings::Finding;
use ashlar_model::{ModelConfig, WeightFiles, digest, hub};
use ashlar_service_kit::memory;
use ashlar_shard_plan::{DeviceReport, Links, MemoryLedger, PlanRequest, plan};
use ashlar_tokenizer::Tokenizer;
use ashlar_vocabulary::{Bytes, ModelShape, NodeId, Precision, Quantization};
use std::path::Path;

/// The context that is asked for, where the model allows it: what it takes is in the KV cache.
const CONTEXT: usize = 4096;
/// Tried in this order where a model does not fit as it is.
const SMALLER: [&str; 3] = ["q8_0", "q6_k", "q4_k_m"];

/// Looks at a directory, a GGUF file, or a hub id that has been fetched.
pub(super) fn examine(model: &str) -> Vec<Finding> {
    let Some(directory) = hub::local(model) else {
        return vec![if hub::is_id(model) {
            Finding::warning(
                format!("{model} is not on this machine"),
                "It is fetched when a role that is told to serve it starts; then look again.",
            )
        } else {
            Finding::problem(
                format!("there is no model at {model}"),
                "Name a directory with config.json, tokenizer.json and *.safetensors, a GGUF file, or a hub id (org/name).",
            )
        }];
    };
    let mut findings = Vec::new();
    let config = match ModelConfig::open(&directory, None) {
        Ok(config) => {
            findings.push(Finding::good(described(&config)));
            Some(config)
        }
        Err(error) => {
            findings.push(Finding::problem(
                error.to_string(),
                "Fetch the file again if it is damaged; an architecture that is not supported cannot be served.",
            ));
            None
        }
    };
    findings.push(weights(&directory));
    findings.extend(text(&directory));
    if let Some(config) = config {
        let available = memory::available_memory().unwrap_or(Bytes(0));
        findings.push(fit(config, Bytes(available.0 / 10 * 9)));
    }
    findings
}

fn described(config: &ModelConfig) -> String {
    let shape = &config.shape;
    format!(
        "{}: {} layers of {} values, a vocabulary of {}, at most {} tokens",
        config.architecture,
        shape.num_layers,
        shape.hidden_size,
        shape.vocab_size,
        shape.max_position_embeddings
    )
}

/// Whether the files are as long as their headers say; gives the digest that all roles have to agree on.
fn weights(directory: &Path) -> Finding {
    let files = match WeightFiles::open(directory) {
        Ok(files) => files,
        Err(error) => {
            return Finding::problem(
                error.to_string(),
                "Fetch the file again: it is missing, cut short or damaged.",
            );
        }
    };
    let tensors = files.list().count();
    match digest::model_digest(directory, Precision::default()) {
        Ok(digest) => Finding::good(format!(
            "{tensors} tensors, all files as long as their headers say; digest {digest}"
        )),
        Err(error) => Finding::problem(error.to_string(), "Fetch the file again: it is damaged."),
    }
}

fn text(directory: &Path) -> Vec<Finding> {
    let tokenizer = match Tokenizer::open(directory) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            return vec![Finding::problem(
                format!("the tokenizer cannot be read: {error}"),
                "Fetch tokenizer.json and tokenizer_config.json of the same model.",
            )];
        }
    };
    let mut findings = vec![Finding::good(format!("a tokenizer of {} tokens", tokenizer.vocab_size()))];
    findings.push(match tokenizer.chat_template() {
        Some(_) => Finding::good("a chat template"),
        None => Finding::warning(
            "no chat template",
            "It completes text (/v1/completions) but does not chat: a base model has none; of others fetch tokenizer_config.json or \
             chat_template.jinja.",
        ),
    });
    if tokenizer.eos_token_ids().is_empty() {
        findings.push(Finding::warning(
            "no token ends an answer",
            "Answers go on to `max_tokens`: fetch generation_config.json, or ask with `stop`.",
        ));
    }
    findings
}

/// Whether one node of this machine could hold all of it, and if not, what would do.
fn fit(mut config: ModelConfig, offered: Bytes) -> Finding {
    let context = CONTEXT.min(config.shape.max_position_embeddings);
    let stored = match ledger(&config.shape, offered, context) {
        Ok(ledger) => {
            return Finding::good(format!(
                "it fits here: {} of {offered} that a node would offer, {} of it KV cache for {context} tokens and more",
                ledger.total, ledger.kv_cache
            ));
        }
        Err(reason) => reason,
    };
    for name in SMALLER {
        let Ok(quantization) = name.parse::<Quantization>() else { continue };
        config.serve_in(Precision::from(Some(quantization)));
        if let Ok(ledger) = ledger(&config.shape, offered, context) {
            return Finding::warning(
                format!("it does not fit here as it is: {stored}"),
                format!(
                    "Quantised to {name} it takes {} of {offered} (`quantize = \"{name}\"`, ashlar up --quantize {name}); or share it \
                     out over more machines (`ashlar plan --model … --device …`).",
                    ledger.total
                ),
            );
        }
    }
    Finding::warning(
        format!("it does not fit on this machine, however it is quantised: {stored}"),
        "Share it out over more machines: `ashlar plan --model … --device NAME=MEMORY,BYTES_PER_S,FLOP_PER_S` says over how many.",
    )
}

fn ledger(shape: &ModelShape, offered: Bytes, context: usize) -> Result<MemoryLedger, String> {
    // Memory alone decides for one node: how fast it is does not.
    let device = DeviceReport {
        node: NodeId("this machine".into()),
        memory: offered,
        bandwidth_bytes_per_s: 1e10,
        flops_per_s: 1e11,
        quantized_flops_per_s: 1e11,
        threads: 1,
        layers: None,
    };
    let request = PlanRequest {
        stages: Some(1),
        tensor_parallel_size: Some(1),
        replicas: Some(1),
        max_context_tokens: context,
        ..PlanRequest::default()
    };
    let layout = plan(shape, &[device], &Links::default(), &request).map_err(|error| error.to_string())?;
    let first = layout.replicas.first().and_then(|replica| replica.stages.first()?.ledgers.first().copied());
    first.ok_or_else(|| "the plan is empty".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;
    use crate::findings::Mark;

    #[test]
    fn a_model_that_is_not_there_is_a_problem_and_one_of_the_hub_is_fetched() {
        assert_eq!(examine("/nowhere/model")[0].mark, Mark::Problem);
        assert_eq!(examine("nobody/no-such-model-here")[0].mark, Mark::Warning);
    }

    #[test]
    fn the_demo_model_is_well_and_one_that_is_cut_short_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let model = crate::demo::unpack(folder.path()).unwrap();
        let found = examine(model.to_str().unwrap());
        assert!(found.iter().all(|finding| finding.mark == Mark::Good), "{found:?}");
        let weights = model.join("model.safetensors");
        let length = std::fs::metadata(&weights).unwrap().len();
        std::fs::File::options().write(true).open(&weights).unwrap().set_len(length / 2).unwrap();
        let found = examine(model.to_str().unwrap());
        assert!(found.iter().any(|finding| finding.mark == Mark::Problem), "{found:?}");
    }

    #[test]
    fn what_does_not_fit_is_said_with_what_would() {
        let folder = tempfile::tempdir().unwrap();
        let model = crate::demo::unpack(folder.path()).unwrap();
        let config = || ModelConfig::open(&model, None).unwrap();
        assert_eq!(fit(config(), Bytes(8 << 30)).mark, Mark::Good);
        assert_eq!(fit(config(), Bytes(1 << 20)).mark, Mark::Warning);
    }
}
