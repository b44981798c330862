//! An unmodified client.

use crate::jobs::examples;
use crate::scheduler::{Action, say};
use crate::world::World;
use ashlar_protocol::serving::FailureKind;
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::InputSource;
use async_openai::types::chat::{CreateChatCompletionRequest, CreateChatCompletionStreamResponse};
use async_openai::types::files::{CreateFileRequest, FileInput, FilePurpose, OpenAIFilePurpose};
use async_openai::types::finetuning::{
    CreateFineTuningJobRequest, FineTuneMethod, FineTuneSupervisedMethod, FineTuningJobStatus,
};
use futures::StreamExt;
use serde_json::{Value, json};

fn client(world: &World) -> Client<OpenAIConfig> {
    let base = format!("http://{}/v1", world.http.address);
    Client::with_config(OpenAIConfig::new().with_api_base(base).with_api_key("none"))
}

fn request(more: Value) -> CreateChatCompletionRequest {
    serde_json::from_value(crate::world::ask(more)).unwrap()
}

#[tokio::test]
async fn async_openai_chats() {
    let world = World::new(|_| say("Hello")).await;
    let answer = client(&world)
        .chat()
        .create(request(json!({"n": 2, "logprobs": true, "top_logprobs": 1, "max_completion_tokens": 9})))
        .await
        .unwrap();
    assert_eq!(answer.choices.len(), 2);
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("Hello"));
    assert_eq!(answer.choices[0].logprobs.as_ref().unwrap().content.as_ref().unwrap().len(), 5);
    assert_eq!(answer.usage.unwrap().prompt_tokens, 6);
}

#[tokio::test]
async fn async_openai_streams() {
    let world = World::new(|_| say("Hello")).await;
    let chunks: Vec<CreateChatCompletionStreamResponse> = client(&world)
        .chat()
        .create_stream(request(json!({"stream_options": {"include_usage": true}})))
        .await
        .unwrap()
        .map(Result::unwrap)
        .collect()
        .await;
    let text: String = chunks.iter().filter_map(|c| c.choices.first()?.delta.content.clone()).collect();
    assert_eq!(text, "Hello");
    assert_eq!(chunks.last().unwrap().usage.as_ref().unwrap().completion_tokens, 6);
}

#[tokio::test]
async fn async_openai_understands_errors_and_models() {
    let world = World::new(|_| vec![Action::Fail(FailureKind::Invalid, "no such thing")]).await;
    let error = client(&world).chat().create(request(json!({}))).await.unwrap_err();
    let OpenAIError::ApiError(error) = error else { panic!("{error}") };
    assert!(error.to_string().contains("no such thing"), "{error}");
    let models = client(&world).models().list().await.unwrap();
    assert_eq!(models.data[0].id, "tiny");
}

#[tokio::test]
async fn async_openai_uploads_and_tunes() {
    let world = World::tuning().await;
    let client = client(&world);
    let input = InputSource::VecU8 { filename: "train.jsonl".into(), vec: examples(10) };
    let upload = CreateFileRequest {
        file: FileInput { source: input },
        purpose: FilePurpose::FineTune,
        expires_after: None,
    };
    let file = client.files().create(upload).await.unwrap();
    assert_eq!((file.filename.as_str(), &file.purpose), ("train.jsonl", &OpenAIFilePurpose::FineTune));
    assert_eq!(client.files().retrieve(&file.id).await.unwrap(), file);
    assert_eq!(client.files().list().await.unwrap().data, std::slice::from_ref(&file));
    assert_eq!(client.files().content(&file.id).await.unwrap(), examples(10));

    let request = CreateFineTuningJobRequest {
        model: "tiny".into(),
        training_file: file.id.clone(),
        seed: Some(3),
        method: Some(FineTuneMethod::Supervised { supervised: FineTuneSupervisedMethod::default() }),
        ..CreateFineTuningJobRequest::default()
    };
    let job = client.fine_tuning().create(request).await.unwrap();
    world.scheduler.until_admin(|admin| !admin.prepared.is_empty()).await;
    assert_eq!(client.fine_tuning().retrieve(&job.id).await.unwrap().status, FineTuningJobStatus::Queued);
    assert_eq!(client.fine_tuning().list_paginated().await.unwrap().data[0].id, job.id);
    assert_eq!(client.fine_tuning().list_events(&job.id).await.unwrap().data.len(), 3);
    assert!(client.fine_tuning().list_checkpoints(&job.id).await.unwrap().data.is_empty());
    assert_eq!(client.fine_tuning().pause(&job.id).await.unwrap().status, FineTuningJobStatus::Paused);
    assert_eq!(client.fine_tuning().resume(&job.id).await.unwrap().status, FineTuningJobStatus::Running);
    assert_eq!(client.fine_tuning().cancel(&job.id).await.unwrap().status, FineTuningJobStatus::Cancelled);
    assert!(client.files().delete(&file.id).await.unwrap().deleted);
}
