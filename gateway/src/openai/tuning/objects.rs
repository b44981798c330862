//! Jobs, events and checkpoints as a client sees them.

use super::ids::{checkpoint_name, event_name, file_name, job_name};
use super::promotion;
use crate::app::unix_seconds;
use crate::tuning::settings::{Choices, DPO_BETA, MethodChoice};
use ashlar_protocol::admin::{
    Checkpoint, DataReport, JobError, JobEvent, JobEventKind, JobRecord, JobStatus,
};
use ashlar_protocol::training::{StepMetrics, TrainingMethod};
use ashlar_vocabulary::JobId;
use serde_json::{Value, json};

/// Who owns jobs, as long as there is nobody else.
const ORGANIZATION: &str = "ashlar";

/// OpenAI's job object, and under `ashlar` what it has no fields for.
pub(super) fn job_object(job: &JobRecord) -> Value {
    let request = &job.request;
    // Settings of another release show as unknown instead of hiding the job.
    let choices: Option<Choices> = serde_json::from_str(&request.settings).ok();
    let hyperparameters = hyperparameters(job, choices.as_ref());
    let finished = job.status.is_final();
    json!({
        "id": job_name(request.id),
        "object": "fine_tuning.job",
        "created_at": request.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": (job.status == JobStatus::Running)
            .then(|| job.remaining_s.map(|seconds| unix_seconds() + seconds))
            .flatten(),
        "model": request.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": ORGANIZATION,
        "status": status(job.status),
        "hyperparameters": hyperparameters,
        "method": method(job, choices.as_ref(), &hyperparameters),
        "training_file": file_name(request.training_file),
        "validation_file": request.validation_file.map(file_name),
        "result_files": job.result_files.iter().map(|file| file_name(*file)).collect::<Vec<_>>(),
        "trained_tokens": finished.then_some(job.trained_tokens),
        "seed": choices.as_ref().map(|choices| choices.seed),
        "integrations": [],
        "metadata": request.metadata,
        "user_provided_suffix": request.suffix,
        "error": job.error.as_ref().map(error_object),
        "ashlar": additional(job, choices.as_ref()),
    })
}

fn status(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Validating => "validating_files",
        JobStatus::Queued => "queued",
        JobStatus::Running => "running",
        JobStatus::Paused => "paused",
        JobStatus::Succeeded => "succeeded",
        JobStatus::Failed => "failed",
        JobStatus::Cancelled => "cancelled",
    }
}

/// Numbers once they are settled, until then the client's, or `"auto"`.
fn hyperparameters(job: &JobRecord, choices: Option<&Choices>) -> Value {
    let settled = job.settings.as_ref();
    let or_auto = |number: Option<Value>| number.unwrap_or_else(|| "auto".into());
    let epochs = settled.map(|s| s.epochs).or(choices.and_then(|c| c.epochs));
    let batch_size = settled.map(|s| s.batch_size).or(choices.and_then(|c| c.batch_size));
    let multiplier = choices.and_then(|c| c.learning_rate_multiplier).or(settled.map(|_| 1.0));
    json!({
        "n_epochs": or_auto(epochs.map(Value::from)),
        "batch_size": or_auto(batch_size.map(Value::from)),
        "learning_rate_multiplier": or_auto(multiplier.map(Value::from)),
    })
}

fn method(job: &JobRecord, choices: Option<&Choices>, hyperparameters: &Value) -> Value {
    let beta = match (
        job.settings.as_ref().map(|settings| settings.method),
        choices.map(|choices| choices.method),
    ) {
        (Some(TrainingMethod::Dpo { beta }), _) => Some(beta),
        (None, Some(MethodChoice::Dpo { beta })) => Some(beta.unwrap_or(DPO_BETA)),
        _ => None,
    };
    let mut hyperparameters = hyperparameters.clone();
    match beta {
        None => json!({"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}),
        Some(beta) => {
            hyperparameters["beta"] = beta.into();
            json!({"type": "dpo", "dpo": {"hyperparameters": hyperparameters}})
        }
    }
}

fn error_object(error: &JobError) -> Value {
    json!({"code": error.code, "message": error.message, "param": error.param})
}

fn additional(job: &JobRecord, choices: Option<&Choices>) -> Value {
    let settled = job.settings.as_ref();
    let full = settled.and_then(|s| s.full).map(|full| full.start).or(choices.and_then(|c| c.full));
    let lora = settled.map(|s| &s.lora).or(choices.map(|c| &c.lora)).filter(|_| full.is_none());
    json!({
        "steps": job.steps,
        "total_steps": settled.map(|s| s.steps),
        "steps_per_epoch": settled.map(|s| s.steps_per_epoch),
        "remaining_seconds": job.remaining_s,
        "trained_tokens": job.trained_tokens,
        "metrics": job.last.as_ref().map(|metrics| step_data(job.steps, settled.map(|s| s.steps), metrics)),
        "learning_rate": settled.map(|s| s.learning_rate),
        "weight_decay": choices.map(|c| c.weight_decay),
        "grad_clip": choices.and_then(|c| c.grad_clip),
        "max_seq_len": choices.map(|c| c.max_seq_len),
        "schedule": choices.map(|c| json!(c.schedule)),
        "early_stopping": choices.and_then(|c| c.early_stopping).map(|early| json!(early)),
        "full": full.is_some(),
        "init": full.map(|start| json!(start)),
        "lora": lora.map(|lora| json!({
            "r": lora.rank,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "rslora": lora.rank_stabilized,
            "target_modules": lora.targets,
        })),
        "data": job.data.as_ref().map(data_object),
        "adapter": job.adapter.map(|adapter| adapter.to_string()),
        "packing": choices.map(|c| c.packing),
        "promote": job.request.promote.as_ref().map(promotion::asked),
        "promotion": promotion::object(job),
    })
}

fn data_object(data: &DataReport) -> Value {
    json!({
        "examples": data.examples,
        "samples": data.samples,
        "tokens": data.tokens,
        "target_tokens": data.target_tokens,
        "longest_sample_rows": data.longest_sample_rows,
        "truncated_examples": data.truncated_examples,
        "truncated_tokens": data.truncated_tokens,
        "warnings": data.warnings,
    })
}

fn step_data(step: u64, steps: Option<u64>, metrics: &StepMetrics) -> Value {
    let mut data = json!({
        "step": step,
        "total_steps": steps,
        "learning_rate": metrics.learning_rate,
        "gradient_norm": metrics.gradient_norm,
        "target_tokens": metrics.targets,
        "tokens": metrics.tokens,
        "skipped": metrics.skipped,
    });
    add_training(metrics, &mut data);
    data
}

/// Adds what a step showed of the training data; of pairs of answers their mean rewards, too, which OpenAI does not tell.
fn add_training(metrics: &StepMetrics, to: &mut Value) {
    to["train_loss"] = metrics.loss.into();
    to[accuracy_name("train", metrics.rewards.is_some())] = metrics.accuracy.into();
    if let Some(rewards) = &metrics.rewards {
        to["train_reward_preferred"] = rewards.preferred.into();
        to["train_reward_non_preferred"] = rewards.non_preferred.into();
        to["train_reward_margin"] = rewards.margin().into();
    }
}

/// What a share is called: OpenAI's word where it is one of tokens; `…_accuracy` where it is one of pairs of answers.
fn accuracy_name(of: &str, pairs: bool) -> String {
    if pairs { format!("{of}_accuracy") } else { format!("{of}_mean_token_accuracy") }
}

fn learns_pairs(job: &JobRecord) -> bool {
    let method = job.settings.as_ref().map(|settings| settings.method);
    matches!(method, Some(TrainingMethod::Dpo { .. }))
}

/// OpenAI's event object. Messages are OpenAI's where it has one for it.
pub(super) fn event_object(job: &JobRecord, event: &JobEvent) -> Value {
    let (level, message, data) = tell(job, &event.what);
    json!({
        "id": event_name(job.request.id, event.number),
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": level,
        "message": message,
        "type": if data.is_null() { "message" } else { "metrics" },
        "data": data,
    })
}

/// Level, message and data.
fn tell(job: &JobRecord, what: &JobEventKind) -> (&'static str, String, Value) {
    let info = |message: String| ("info", message, Value::Null);
    let warn = |message: String| ("warn", message, Value::Null);
    match what {
        JobEventKind::Created => info(format!("Created fine-tuning job: {}", job_name(job.request.id))),
        JobEventKind::Validating => {
            let training = file_name(job.request.training_file);
            match job.request.validation_file {
                None => info(format!("Validating training file: {training}")),
                Some(validation) => info(format!(
                    "Validating training file: {training} and validation file: {}",
                    file_name(validation)
                )),
            }
        }
        JobEventKind::Queued(data) if data.warnings.is_empty() => {
            info("Files validated, moving job to queued state".to_owned())
        }
        JobEventKind::Queued(data) => {
            warn(format!("Files validated, moving job to queued state. Note: {}", data.warnings.join("; ")))
        }
        JobEventKind::Started => info("Fine-tuning job started".to_owned()),
        JobEventKind::Step { step, steps, metrics } if metrics.skipped => {
            let message = format!(
                "Step {step}/{steps}: the loss or its gradient was no number, so this step changed nothing"
            );
            ("warn", message, step_data(*step, Some(*steps), metrics))
        }
        JobEventKind::Step { step, steps, metrics } => (
            "info",
            format!("Step {step}/{steps}: training loss={:.2}", metrics.loss),
            step_data(*step, Some(*steps), metrics),
        ),
        JobEventKind::Evaluated { step, loss, accuracy } => (
            "info",
            format!("Step {step}: validation loss={loss:.2}"),
            json!({"step": step, "valid_loss": loss, accuracy_name("valid", learns_pairs(job)): accuracy}),
        ),
        JobEventKind::Checkpoint { step, model } => {
            info(format!("Checkpoint created at step {step}: {model}"))
        }
        JobEventKind::Interrupted(why) => {
            warn(format!("Fine-tuning interrupted, going on from the last step: {why}"))
        }
        JobEventKind::Slowed(why) => warn(format!("Fine-tuning job is slowed down: {why}")),
        JobEventKind::WaitsForMemory(why) => info(format!("Fine-tuning job waits for memory: {why}")),
        JobEventKind::Paused => info("Fine-tuning job paused".to_owned()),
        JobEventKind::Resumed => info("Fine-tuning job resumed".to_owned()),
        JobEventKind::StoppedEarly { step } => {
            info(format!("Stopped early at step {step}: the validation loss no longer falls"))
        }
        JobEventKind::ModelCreated(model) => info(format!("New fine-tuned model created: {model}")),
        JobEventKind::ModelStored(files) => {
            let list: Vec<Value> =
                files.iter().map(|(id, name)| json!({"id": file_name(*id), "filename": name})).collect();
            let named: Vec<String> =
                files.iter().map(|(id, name)| format!("{name} ({})", file_name(*id))).collect();
            let message = format!("The trained model is stored as result files: {}", named.join(", "));
            ("info", message, json!({"files": list}))
        }
        JobEventKind::Comparing { name, generation } => info(format!(
            "Adapter stored as generation {generation} of {name}, comparing it with what is served there"
        )),
        JobEventKind::Compared(outcome) => promotion::told(job, outcome),
        JobEventKind::Succeeded => info("The job has successfully completed".to_owned()),
        JobEventKind::Cancelled => info("Fine-tuning job cancelled".to_owned()),
        JobEventKind::Failed(error) => ("error", format!("The job failed: {}", error.message), Value::Null),
    }
}

/// Whether nothing follows this event.
pub(super) fn is_last(what: &JobEventKind) -> bool {
    matches!(what, JobEventKind::Succeeded | JobEventKind::Cancelled | JobEventKind::Failed(_))
}

/// OpenAI's checkpoint object.
pub(super) fn checkpoint_object(job: JobId, checkpoint: &Checkpoint) -> Value {
    let mut metrics = json!({"step": checkpoint.step});
    add_training(&checkpoint.metrics, &mut metrics);
    if let Some((loss, accuracy)) = checkpoint.validation {
        let pairs = checkpoint.metrics.rewards.is_some();
        // Validation data is always measured in full.
        for of in ["valid", "full_valid"] {
            metrics[format!("{of}_loss")] = loss.into();
            metrics[accuracy_name(of, pairs)] = accuracy.into();
        }
    }
    json!({
        "id": checkpoint_name(job, checkpoint.number),
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "files": checkpoint.files.iter().map(|file| file_name(*file)).collect::<Vec<_>>(),
        "fine_tuning_job_id": job_name(job),
        "metrics": metrics,
        "step_number": checkpoint.step,
    })
}
