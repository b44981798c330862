//! One job from its creation to its end, by a client whose gateway may be away at any moment.

use super::{Board, GAP_MAX};
use crate::http::{Client, is_refusal};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How often a job is looked at, and before whoever did not answer is asked again.
const POLL: Duration = Duration::from_millis(100);
/// Longest wait for one answer: a gateway may be frozen.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest time in which nobody answers at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// Jobs among which one is looked for whose creation was not answered.
const PAGE: u32 = 20;
const JOBS: &str = "/v1/fine_tuning/jobs";

/// Creates a job and follows it; the digest of its adapter, or `None` if it hung (and was cancelled).
///
/// # Errors
/// If it failed, or nobody answered for a minute.
pub(super) async fn run(
    client: &Client,
    request: &Value,
    label: &str,
    board: &Board,
    worker: usize,
) -> Result<Option<String>> {
    board.begins(worker, None);
    let ended = create_and_follow(client, request, label, board, worker).await;
    board.steps(worker, false);
    ended
}

async fn create_and_follow(
    client: &Client,
    request: &Value,
    label: &str,
    board: &Board,
    worker: usize,
) -> Result<Option<String>> {
    let id = create(client, request, label).await.context("cannot create a job")?;
    board.begins(worker, Some(&id));
    let path = format!("{JOBS}/{id}");
    let mut steps = 0;
    loop {
        let job = patiently(|| client.get_ok(&path)).await.with_context(|| format!("cannot look at {id}"))?;
        let committed = job["ashlar"]["steps"].as_u64().unwrap_or(0);
        if committed > steps {
            steps = committed;
            board.steps(worker, true);
        }
        match job["status"].as_str() {
            Some("succeeded") => {
                let adapter =
                    job["ashlar"]["adapter"].as_str().context("a job without an adapter")?.to_owned();
                tidy(client, &job).await;
                return Ok(Some(adapter));
            }
            Some("failed" | "cancelled") => {
                bail!("{id} {}: {}", job["status"], job["error"]["message"]);
            }
            _ if board.gap(worker) > GAP_MAX => {
                cancel(client, &id).await;
                return Ok(None);
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

/// Creates the job once: one whose creation was not answered is found again by its suffix.
async fn create(client: &Client, request: &Value, label: &str) -> Result<String> {
    let mut body = request.clone();
    body["suffix"] = label.into();
    let mut asked = false;
    let job = patiently(|| {
        let again = std::mem::replace(&mut asked, true);
        let body = &body;
        async move {
            match if again { find(client, label).await? } else { None } {
                Some(job) => Ok(job),
                None => client.post(JOBS, body).await,
            }
        }
    });
    let job = job.await?;
    job["id"].as_str().map(str::to_owned).context("a job without an id")
}

async fn find(client: &Client, label: &str) -> Result<Option<Value>> {
    let page = client.get_ok(&format!("{JOBS}?limit={PAGE}")).await?;
    let mut jobs = page["data"].as_array().into_iter().flatten();
    Ok(jobs.find(|job| job["user_provided_suffix"] == label).cloned())
}

/// Cancels a job, as far as somebody answers.
pub(super) async fn cancel(client: &Client, id: &str) {
    let path = format!("{JOBS}/{id}/cancel");
    let _ = patiently(|| async { client.post(&path, &json!({})).await }).await;
}

/// Removes what a job has left: a long drill makes thousands of adapters. What nobody can remove now stays.
async fn tidy(client: &Client, job: &Value) {
    let Some(name) = job["fine_tuned_model"].as_str() else { return };
    if let Ok(models) = patiently(|| client.get_ok("/v1/models")).await {
        let ids = models["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        // Its checkpoints have longer names.
        for id in ids.filter(|id| id.starts_with(name)) {
            remove(client, &format!("/v1/models/{id}")).await;
        }
    }
    for file in job["result_files"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        remove(client, &format!("/v1/files/{file}")).await;
    }
}

async fn remove(client: &Client, path: &str) {
    let _ = patiently(|| client.delete(path)).await;
}

/// What is answered once somebody does; a refusal is an answer.
async fn patiently<F: Future<Output = Result<Value>>>(mut ask: impl FnMut() -> F) -> Result<Value> {
    let began = Instant::now();
    loop {
        let answer = match tokio::time::timeout(ANSWER_MAX, ask()).await {
            Ok(answer) => answer,
            Err(_) => Err(anyhow::anyhow!("no answer within {} s", ANSWER_MAX.as_secs())),
        };
        match answer {
            Err(error) if !is_refusal(&error) && began.elapsed() < PATIENCE => tokio::time::sleep(POLL).await,
            answer => return answer,
        }
    }
}
