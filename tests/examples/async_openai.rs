//! The client `async-openai` against Ashlar: a chat, a stream, and a small fine-tuning job.
//!
//! ```sh
//! OPENAI_BASE_URL=http://127.0.0.1:8080/v1 cargo run --release -p ashlar-tests --example async_openai
//! ```
//!
//! With `OPENAI_API_KEY` where the gateway wants a key.

use anyhow::{Context, Result, bail};
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::types::chat::CreateChatCompletionRequest;
use async_openai::types::files::{CreateFileRequest, FileInput, FilePurpose};
use async_openai::types::finetuning::{CreateFineTuningJobRequest, FineTuningJobStatus};
use futures::StreamExt;
use serde_json::json;
use std::time::Duration;

const MODEL: &str = "ashlar-demo";
const WORDS: [&str; 8] = ["stone", "arch", "wall", "quarry", "mortar", "vault", "pillar", "lintel"];

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("OPENAI_BASE_URL").unwrap_or_else(|_| "http://127.0.0.1:8080/v1".into());
    let key = std::env::var("OPENAI_API_KEY").unwrap_or_else(|_| "none is needed".into());
    let client = Client::with_config(OpenAIConfig::new().with_api_base(url).with_api_key(key));

    let models = client.models().list().await?.data;
    println!("models: {}", models.into_iter().map(|model| model.id).collect::<Vec<_>>().join(", "));
    println!("chat:   {}", chat(&client, "What is 12 + 34?", MODEL).await?);
    println!("stream: {}", stream(&client, "Reverse the word stone.").await?);
    let tuned = tune(&client).await?;
    println!("tuned:  {tuned}");
    println!("chat:   {}", chat(&client, "Double every letter of stone.", &tuned).await?);
    Ok(())
}

fn request(question: &str, model: &str) -> Result<CreateChatCompletionRequest> {
    let body = json!({"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0});
    Ok(serde_json::from_value(body)?)
}

async fn chat(client: &Client<OpenAIConfig>, question: &str, model: &str) -> Result<String> {
    let answer = client.chat().create(request(question, model)?).await?;
    let choice = answer.choices.into_iter().next().context("an answer without choices")?;
    Ok(choice.message.content.unwrap_or_default())
}

async fn stream(client: &Client<OpenAIConfig>, question: &str) -> Result<String> {
    let mut parts = client.chat().create_stream(request(question, MODEL)?).await?;
    let mut text = String::new();
    while let Some(part) = parts.next().await {
        text.extend(part?.choices.into_iter().filter_map(|choice| choice.delta.content));
    }
    Ok(text)
}

/// Words, and the same with every letter doubled: a chat per line.
fn examples() -> String {
    let line = |word: &&str| {
        let doubled: String = word.chars().flat_map(|letter| [letter, letter]).collect();
        let asked = format!("Double every letter of {word}.");
        json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": doubled}]})
            .to_string()
    };
    WORDS.iter().cycle().take(32).map(line).collect::<Vec<_>>().join("\n")
}

async fn tune(client: &Client<OpenAIConfig>) -> Result<String> {
    let file = FileInput::from_vec_u8("doubling.jsonl".into(), examples().into_bytes());
    let upload = CreateFileRequest { file, purpose: FilePurpose::FineTune, ..CreateFileRequest::default() };
    let uploaded = client.files().create(upload).await?;
    let hyperparameters = json!({"n_epochs": 8, "batch_size": 8, "learning_rate_multiplier": 10});
    let wanted: CreateFineTuningJobRequest = serde_json::from_value(json!({
        "model": MODEL, "training_file": uploaded.id, "suffix": "rust", "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }))?;
    let mut job = client.fine_tuning().create(wanted).await?;
    loop {
        match job.status {
            FineTuningJobStatus::Succeeded => return job.fine_tuned_model.context("a job without a model"),
            FineTuningJobStatus::Failed | FineTuningJobStatus::Cancelled => {
                bail!("the job ended as {:?}: {:?}", job.status, job.error)
            }
            _ => tokio::time::sleep(Duration::from_secs(1)).await,
        }
        job = client.fine_tuning().retrieve(&job.id).await?;
    }
}
