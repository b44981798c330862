//! Driving a generation into a stream of server-sent events, whatever their form.

use super::error::ApiError;
use super::sse;
use crate::app::App;
use crate::generation::{Generation, Output};
use crate::transcript::{Delta, End};
use ashlar_protocol::serving::FinishReason;
use axum::response::Response;
use bytes::Bytes;
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::time::timeout;

/// The form of a stream's chunks. Each method appends chunks.
pub(crate) trait StreamForm: Send + 'static {
    /// A choice goes on.
    fn delta(&mut self, choice: usize, delta: Delta, generation: &Generation, chunks: &mut Vec<Value>);
    /// A choice has ended.
    fn end(&mut self, choice: usize, reason: FinishReason, generation: &Generation, chunks: &mut Vec<Value>);
    /// All choices have ended.
    fn last(&mut self, generation: &Generation, chunks: &mut Vec<Value>);
}

struct Stream<F> {
    app: Arc<App>,
    generation: Generation,
    form: F,
    frames: VecDeque<Bytes>,
    over: bool,
}

/// Answers with a stream. A failure before the first output still has its HTTP status.
pub(crate) async fn respond(
    app: Arc<App>,
    generation: Generation,
    form: impl StreamForm,
) -> Result<Response, ApiError> {
    let keep_alive = app.config.keep_alive();
    let mut stream = Stream { app, generation, form, frames: VecDeque::new(), over: false };
    match timeout(keep_alive, stream.generation.next()).await {
        Ok(Some(Output::End { end: End::Failed(failure), .. })) => return Err(failure.into()),
        Ok(Some(output)) => stream.take(output),
        Ok(None) => {}
        Err(_) => stream.frames.push_back(sse::keep_alive()),
    }
    Ok(sse::response(futures::stream::unfold(stream, |mut stream| async move {
        let frame = stream.next().await?;
        Some((frame, stream))
    })))
}

impl<F: StreamForm> Stream<F> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(frame);
            }
            if self.over {
                return None;
            }
            match timeout(self.app.config.keep_alive(), self.generation.next()).await {
                Ok(Some(output)) => self.take(output),
                Ok(None) => self.finish(),
                Err(_) => return Some(sse::keep_alive()),
            }
        }
    }

    fn take(&mut self, output: Output) {
        let mut chunks = Vec::new();
        match output {
            Output::Delta { choice, delta } => self.form.delta(choice, delta, &self.generation, &mut chunks),
            Output::End { choice, end: End::Finished { reason, .. } } => {
                self.form.end(choice, reason, &self.generation, &mut chunks);
            }
            Output::End { end: End::Failed(failure), .. } => {
                chunks.push(ApiError::from(failure).envelope());
                self.over = true;
            }
        }
        self.frames.extend(chunks.iter().map(sse::event));
        if self.over {
            self.frames.push_back(sse::done());
        }
    }

    fn finish(&mut self) {
        let mut chunks = Vec::new();
        self.form.last(&self.generation, &mut chunks);
        self.frames.extend(chunks.iter().map(sse::event));
        self.frames.push_back(sse::done());
        self.over = true;
    }
}
