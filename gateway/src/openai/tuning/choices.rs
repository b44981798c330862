//! A job's request, read: OpenAI's fields and ours.

use super::ids::read_file_name;
use crate::openai::error::ApiError;
use crate::openai::fields::{Fields, type_name};
use crate::tuning::settings::{
    Choices, DecayChoice, EarlyStopping, GRADIENT_NORM_MAX, LATE_SHARE, LEARNING_RATE, LEARNING_RATE_DPO,
    LEARNING_RATE_FULL, LEARNING_RATE_RANDOM, LINEAR_MODULES, MethodChoice, SEQUENCE_TOKENS_MAX,
    ScheduleChoice, Span, WARMUP_SHARE,
};
use ashlar_protocol::admin::{Promotion, PromotionMetric};
use ashlar_protocol::training::{LoraSettings, ModelStart};
use ashlar_vocabulary::FileId;
use serde_json::Value;
use std::collections::BTreeMap;

const SUFFIX_CHARS_MAX: usize = 64;
const METADATA_MAX: usize = 16;
const METADATA_KEY_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;
/// OpenAI's seeds are below 2^31, and clients read them so.
const SEED_MAX: i64 = i32::MAX as i64;
/// What clients' types hold.
const EPOCHS_MAX: i64 = 255;
const BATCH_SIZE_MAX: i64 = 4096;
const MULTIPLIER: (f64, f64) = (1e-6, 1e3);
const BETA: (f64, f64) = (1e-6, 2.0);
const LEARNING_RATE_RANGE: (f64, f64) = (1e-9, 1.0);
const RANK: u32 = 16;
const RANK_MAX: i64 = 256;
const ALPHA: f64 = 32.0;
const ALPHA_RANGE: (f64, f64) = (1e-3, 4096.0);
const DROPOUT_MAX: f64 = 0.9;
const GRAD_CLIP_MAX: f64 = 1e6;
const STEPS_MAX: i64 = 1 << 40;
const PATIENCE: i64 = 3;
const PATIENCE_MAX: i64 = 1000;
const VALIDATION_SPLIT: f64 = 0.1;
/// Far above what guessing among all tokens of any model costs, in nats.
const LOSS_BOUND_MAX: f64 = 1e3;

/// A request that is good in itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JobForm {
    pub(super) model: String,
    pub(super) training_file: FileId,
    pub(super) validation_file: Option<FileId>,
    pub(super) suffix: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) choices: Choices,
    pub(super) promote: Option<Promotion>,
    /// What nobody knows.
    pub(super) unknown: Vec<String>,
}

impl JobForm {
    /// Reads a body. `seed` is for a request without one, `context` the longest sequence that the model takes.
    pub(crate) fn parse(body: &[u8], seed: u32, context: u32) -> Result<JobForm, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?.ok_or_else(|| fields.required("model"))?;
        let training_file =
            file(&mut fields, "training_file")?.ok_or_else(|| fields.required("training_file"))?;
        let validation_file = file(&mut fields, "validation_file")?;
        let (suffix, metadata) = (suffix(&mut fields)?, metadata(&mut fields)?);
        refuse_what_is_not_yet(&mut fields)?;
        let (method, hyper) = method(&mut fields)?;
        let seed = fields
            .integer("seed", 0, SEED_MAX)?
            .map_or(u64::from(seed) & SEED_MAX as u64, |seed| seed as u64);
        let full = full(&mut fields, method)?;
        let packing = packing(&mut fields, hyper.packing)?;
        let files = Files { training: training_file, validation: validation_file };
        let promote = promote(&mut fields, method, full, &files)?;
        let default_rate = match (method, full) {
            (MethodChoice::Dpo { .. }, _) => LEARNING_RATE_DPO,
            (MethodChoice::Supervised, None) => LEARNING_RATE,
            (MethodChoice::Supervised, Some(ModelStart::Model)) => LEARNING_RATE_FULL,
            (MethodChoice::Supervised, Some(ModelStart::Random)) => LEARNING_RATE_RANDOM,
        };
        let (low, high) = LEARNING_RATE_RANGE;
        let choices = Choices {
            method,
            epochs: hyper.epochs,
            batch_size: hyper.batch_size,
            learning_rate_multiplier: hyper.learning_rate_multiplier,
            learning_rate: fields.number("learning_rate", low, high)?.unwrap_or(default_rate),
            weight_decay: fields.number("weight_decay", 0.0, 1.0)?.unwrap_or(0.0) as f32,
            grad_clip: match fields.number("grad_clip", 0.0, GRAD_CLIP_MAX)? {
                None => Some(GRADIENT_NORM_MAX),
                Some(norm) => (norm > 0.0).then_some(norm),
            },
            seed,
            lora: lora(&mut fields)?,
            full,
            schedule: schedule(&mut fields)?,
            max_seq_len: match fields.integer("max_seq_len", 2, i64::from(context))? {
                Some(tokens) => tokens as u32,
                None => context.min(SEQUENCE_TOKENS_MAX),
            },
            early_stopping: early_stopping(&mut fields, validation_file.is_some())?,
            packing,
        };
        let unknown = fields.unknown();
        Ok(JobForm { model, training_file, validation_file, suffix, metadata, choices, promote, unknown })
    }
}

#[derive(Default)]
struct Hyperparameters {
    epochs: Option<u32>,
    batch_size: Option<u32>,
    learning_rate_multiplier: Option<f64>,
    beta: Option<f64>,
    packing: Option<bool>,
}

/// The files of a job.
struct Files {
    training: FileId,
    validation: Option<FileId>,
}

fn file(fields: &mut Fields, name: &str) -> Result<Option<FileId>, ApiError> {
    let Some(text) = fields.string(name)? else { return Ok(None) };
    let path = fields.path(name);
    let unknown =
        || ApiError::field(&path, format!("`{path}` is no file's id: use the `id` that uploading it gave"));
    read_file_name(&text).map(Some).ok_or_else(unknown)
}

fn suffix(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(suffix) = fields.string("suffix")? else { return Ok(None) };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if suffix.is_empty() || suffix.len() > SUFFIX_CHARS_MAX || !suffix.chars().all(plain) {
        let message = format!(
            "`suffix` must be 1 to {SUFFIX_CHARS_MAX} letters, digits and ._-, for it is part of a name"
        );
        return Err(ApiError::field("suffix", message));
    }
    Ok(Some(suffix))
}

fn metadata(fields: &mut Fields) -> Result<BTreeMap<String, String>, ApiError> {
    let map = match fields.take("metadata") {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields.mistyped("metadata", "an object", &other)),
    };
    let wrong = |message: String| ApiError::field("metadata", message);
    if map.len() > METADATA_MAX {
        return Err(wrong(format!("`metadata` has more than {METADATA_MAX} entries: send fewer")));
    }
    map.into_iter()
        .map(|(key, value)| match value {
            Value::String(value)
                if key.chars().count() <= METADATA_KEY_CHARS_MAX
                    && value.chars().count() <= METADATA_VALUE_CHARS_MAX =>
            {
                Ok((key, value))
            }
            Value::String(_) => Err(wrong(format!(
                "`metadata` may have keys of {METADATA_KEY_CHARS_MAX} and values of {METADATA_VALUE_CHARS_MAX} characters"
            ))),
            other => Err(wrong(format!("`metadata` must have strings as values, not {}", type_name(&other)))),
        })
        .collect()
}

fn refuse_what_is_not_yet(fields: &mut Fields) -> Result<(), ApiError> {
    if fields.array("integrations")?.is_some_and(|list| !list.is_empty()) {
        let message = "`integrations` are not possible here: leave them out, and follow the job's events";
        return Err(ApiError::field("integrations", message));
    }
    Ok(())
}

/// The method with its hyperparameters, or the deprecated form without a method.
fn method(fields: &mut Fields) -> Result<(MethodChoice, Hyperparameters), ApiError> {
    let deprecated = fields.object("hyperparameters")?;
    let Some(mut method) = fields.object("method")? else {
        let Some(mut given) = deprecated else {
            return Ok((MethodChoice::Supervised, Hyperparameters::default()));
        };
        let hyper = hyperparameters(&mut given, false)?;
        fields.finish(given);
        return Ok((MethodChoice::Supervised, hyper));
    };
    if deprecated.is_some() {
        let message = "`hyperparameters` stand in `method` when there is one: send them there alone";
        return Err(ApiError::field("hyperparameters", message));
    }
    let kind = method.string("type")?.ok_or_else(|| method.required("type"))?;
    let dpo = match kind.as_str() {
        "supervised" => false,
        "dpo" => true,
        _ => {
            let message = "`method.type` must be supervised or dpo: other methods are not possible here";
            return Err(ApiError::field("method.type", message));
        }
    };
    let mut hyper = Hyperparameters::default();
    if let Some(mut inner) = method.object(&kind)? {
        if let Some(mut given) = inner.object("hyperparameters")? {
            hyper = hyperparameters(&mut given, dpo)?;
            inner.finish(given);
        }
        method.finish(inner);
    }
    fields.finish(method);
    let choice = if dpo { MethodChoice::Dpo { beta: hyper.beta } } else { MethodChoice::Supervised };
    Ok((choice, hyper))
}

fn hyperparameters(given: &mut Fields, dpo: bool) -> Result<Hyperparameters, ApiError> {
    Ok(Hyperparameters {
        epochs: auto(given, "n_epochs", |given, name| given.integer(name, 1, EPOCHS_MAX))?.map(|n| n as u32),
        batch_size: auto(given, "batch_size", |given, name| given.integer(name, 1, BATCH_SIZE_MAX))?
            .map(|n| n as u32),
        learning_rate_multiplier: auto(given, "learning_rate_multiplier", |given, name| {
            given.number(name, MULTIPLIER.0, MULTIPLIER.1)
        })?,
        beta: if dpo { auto(given, "beta", |given, name| given.number(name, BETA.0, BETA.1))? } else { None },
        packing: auto(given, "packing", |given, name| given.bool(name))?,
    })
}

/// Whether samples share micro-batches: said among the hyperparameters, or beside the method.
fn packing(fields: &mut Fields, among: Option<bool>) -> Result<bool, ApiError> {
    match (fields.bool("packing")?, among) {
        (Some(beside), Some(among)) if beside != among => {
            let message = "`packing` stands here and among the hyperparameters, and they differ: send one";
            Err(ApiError::field("packing", message))
        }
        (beside, among) => Ok(among.or(beside).unwrap_or(true)),
    }
}

/// When the finished adapter is served: always, or only if it is better than what is.
fn promote(
    fields: &mut Fields,
    method: MethodChoice,
    full: Option<ModelStart>,
    files: &Files,
) -> Result<Option<Promotion>, ApiError> {
    let Some(mut given) = fields.object("promote")? else { return Ok(None) };
    if full.is_some() {
        let message =
            "`promote` is for adapters: a model all of whose weights are trained is not served by itself";
        return Err(ApiError::field("promote", message));
    }
    let metric = given.string("metric")?.ok_or_else(|| given.required("metric"))?;
    let metric = match metric.as_str() {
        "exact_match" => PromotionMetric::ExactMatch,
        "loss" => PromotionMetric::Loss,
        _ => {
            let path = given.path("metric");
            return Err(ApiError::field(&path, format!("`{path}` must be exact_match or loss")));
        }
    };
    let (at_least, at_most) =
        (given.number("at_least", 0.0, 1.0)?, given.number("at_most", 0.0, LOSS_BOUND_MAX)?);
    let bound = match (metric, at_least, at_most) {
        (PromotionMetric::ExactMatch, at_least, None) => at_least,
        (PromotionMetric::Loss, None, at_most) => at_most,
        (PromotionMetric::ExactMatch, _, Some(_)) => {
            let path = given.path("at_most");
            let message = format!("`{path}` is of a loss: with exact_match send `at_least`, a share");
            return Err(ApiError::field(&path, message));
        }
        (PromotionMetric::Loss, Some(_), _) => {
            let path = given.path("at_least");
            let message =
                format!("`{path}` is of exact_match: with a loss, which is to be low, send `at_most`");
            return Err(ApiError::field(&path, message));
        }
    };
    let path = given.path("file");
    let wrong = |message: &str| Err(ApiError::field(&path, format!("`{path}` {message}")));
    // A preference has no one right answer.
    let validation = files.validation.filter(|_| method == MethodChoice::Supervised);
    let file = match file(&mut given, "file")?.or(validation) {
        Some(file) if file == files.training => {
            return wrong("is the training file: name one with examples that are not trained");
        }
        Some(file) => file,
        None if files.validation.is_some() => {
            return wrong(
                "is required: a validation file of preferences has no right answers to compare with",
            );
        }
        None => return wrong("is required where there is no `validation_file`: name a file to compare on"),
    };
    fields.finish(given);
    Ok(Some(Promotion { metric, file, bound }))
}

/// A number, or `"auto"`.
fn auto<T>(
    given: &mut Fields,
    name: &str,
    read: impl FnOnce(&mut Fields, &str) -> Result<Option<T>, ApiError>,
) -> Result<Option<T>, ApiError> {
    if given.take_if(name, |value| value == "auto") { Ok(None) } else { read(given, name) }
}

/// Whether all weights are trained instead of an adapter, and from what.
fn full(fields: &mut Fields, method: MethodChoice) -> Result<Option<ModelStart>, ApiError> {
    let full = fields.bool("full")? == Some(true);
    let init = fields.string("init")?;
    if !full {
        return match init {
            None => Ok(None),
            Some(_) => {
                let message =
                    "`init` is for jobs that train all weights: send `full` true with it, or leave it out";
                Err(ApiError::field("init", message))
            }
        };
    }
    if fields.has("lora") {
        let message = "`lora` and `full` exclude each other: an adapter is trained, or all weights";
        return Err(ApiError::field("lora", message));
    }
    if let MethodChoice::Dpo { .. } = method {
        let message = "`full` is not possible with dpo: leave it out, and an adapter is trained";
        return Err(ApiError::field("full", message));
    }
    match init.as_deref() {
        None | Some("model") => Ok(Some(ModelStart::Model)),
        Some("random") => Ok(Some(ModelStart::Random)),
        Some(_) => Err(ApiError::field("init", "`init` must be model or random")),
    }
}

fn lora(fields: &mut Fields) -> Result<LoraSettings, ApiError> {
    let mut settings = LoraSettings {
        rank: RANK,
        alpha: ALPHA,
        rank_stabilized: false,
        dropout: 0.0,
        targets: LINEAR_MODULES.map(str::to_owned).to_vec(),
    };
    let Some(mut given) = fields.object("lora")? else { return Ok(settings) };
    if let Some(rank) = given.integer("r", 1, RANK_MAX)? {
        settings.rank = rank as u32;
        // As usual: an adapter of another rank learns as fast.
        settings.alpha = 2.0 * rank as f64;
    }
    if let Some(alpha) = given.number("alpha", ALPHA_RANGE.0, ALPHA_RANGE.1)? {
        settings.alpha = alpha;
    }
    settings.dropout = given.number("dropout", 0.0, DROPOUT_MAX)?.unwrap_or(0.0) as f32;
    settings.rank_stabilized = given.bool("rslora")?.unwrap_or(false);
    let path = given.path("target_modules");
    let wrong = || {
        let message = format!("`{path}` must be all-linear, or a list of {}", LINEAR_MODULES.join(", "));
        ApiError::field(&path, message)
    };
    match given.take("target_modules") {
        None => {}
        Some(Value::String(all)) if all == "all-linear" => {}
        Some(Value::Array(names)) => {
            let names: Vec<&str> = names.iter().map(|name| name.as_str().unwrap_or_default()).collect();
            if names.is_empty() || names.iter().any(|name| !LINEAR_MODULES.contains(name)) {
                return Err(wrong());
            }
            // In one order, whatever the client's, and each once.
            settings.targets =
                LINEAR_MODULES.into_iter().filter(|own| names.contains(own)).map(str::to_owned).collect();
        }
        Some(_) => return Err(wrong()),
    }
    fields.finish(given);
    Ok(settings)
}

/// The name of a course, or an object with its `type` and more.
fn schedule(fields: &mut Fields) -> Result<ScheduleChoice, ApiError> {
    let mut choice = ScheduleChoice {
        decay: DecayChoice::Linear,
        warmup: Span::Share(WARMUP_SHARE),
        floor: 0.0,
        late: Span::Share(LATE_SHARE),
    };
    let kind = |path: &str, name: &str| match name {
        "constant" => Ok(DecayChoice::Constant),
        "linear" => Ok(DecayChoice::Linear),
        "cosine" => Ok(DecayChoice::Cosine),
        "late" => Ok(DecayChoice::Late),
        _ => Err(ApiError::field(path, format!("`{path}` must be constant, linear, cosine or late"))),
    };
    match fields.take("schedule") {
        None => {}
        Some(Value::String(name)) => choice.decay = kind("schedule", &name)?,
        Some(object @ Value::Object(_)) => {
            let mut given = Fields::of(object, "schedule")?;
            if let Some(name) = given.string("type")? {
                choice.decay = kind("schedule.type", &name)?;
            }
            choice.warmup = span(&mut given, "warmup", choice.warmup)?;
            choice.late = span(&mut given, "decay", choice.late)?;
            choice.floor = given.number("floor", 0.0, 1.0)?.unwrap_or(choice.floor);
            fields.finish(given);
        }
        Some(other) => return Err(fields.mistyped("schedule", "a string or an object", &other)),
    }
    Ok(choice)
}

/// `…_steps`, or `…_ratio` of all steps.
fn span(given: &mut Fields, name: &str, default: Span) -> Result<Span, ApiError> {
    let (steps, ratio) = (format!("{name}_steps"), format!("{name}_ratio"));
    let share = given.number(&ratio, 0.0, 1.0)?.map(Span::Share);
    match given.integer(&steps, 0, STEPS_MAX)? {
        Some(_) if share.is_some() => {
            let path = given.path(&steps);
            Err(ApiError::field(
                &path,
                format!("`{path}` and `{}` exclude each other: send one", given.path(&ratio)),
            ))
        }
        Some(steps) => Ok(Span::Steps(steps as u64)),
        None => Ok(share.unwrap_or(default)),
    }
}

/// `true`, or an object with `patience` and `validation_split`.
fn early_stopping(fields: &mut Fields, has_file: bool) -> Result<Option<EarlyStopping>, ApiError> {
    let mut choice = EarlyStopping { patience: PATIENCE as u32, validation_split: VALIDATION_SPLIT };
    match fields.take("early_stopping") {
        None | Some(Value::Bool(false)) => return Ok(None),
        Some(Value::Bool(true)) => {}
        Some(object @ Value::Object(_)) => {
            let mut given = Fields::of(object, "early_stopping")?;
            choice.patience = given.integer("patience", 1, PATIENCE_MAX)?.unwrap_or(PATIENCE) as u32;
            if let Some(share) = given.number("validation_split", 0.001, 0.5)? {
                if has_file {
                    let path = given.path("validation_split");
                    let message = format!("`{path}` and `validation_file` exclude each other: send one");
                    return Err(ApiError::field(&path, message));
                }
                choice.validation_split = share;
            }
            fields.finish(given);
        }
        Some(other) => return Err(fields.mistyped("early_stopping", "a boolean or an object", &other)),
    }
    Ok(Some(choice))
}
