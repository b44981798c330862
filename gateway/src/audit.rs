//! Who has changed what: a line for each request that changes more than an answer, in a file of JSON lines and in the log.
//!
//! A line names the key and never shows it; of a request it has method and path, never the body.

use crate::access::{Access, Caller};
use crate::error::GatewayError;
use ashlar_vocabulary::RequestId;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest path that is written down.
const PATH_CHARS_MAX: usize = 512;

/// Where actions are written down.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    file: Option<Mutex<File>>,
}

/// What was asked for, and by whom.
#[derive(Debug)]
pub(crate) struct Action {
    line: Value,
}

impl Audit {
    /// Appends to a file, if one is given.
    pub(crate) fn open(path: Option<&Path>) -> Result<Audit, GatewayError> {
        let Some(path) = path else { return Ok(Audit::default()) };
        let failed = |source| GatewayError::AuditLog { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(failed)?;
        Ok(Audit { file: Some(Mutex::new(file)) })
    }

    /// What is to be written down of a request, if it changes something.
    pub(crate) fn of(
        &self,
        access: Access,
        request: &Request,
        caller: &Caller,
        id: RequestId,
    ) -> Option<Action> {
        let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        if !changes || !matches!(access, Access::Admin | Access::Training) {
            return None;
        }
        let path: String = request.uri().path().chars().take(PATH_CHARS_MAX).collect();
        let key = caller.key();
        let line = json!({
            "request": id.to_string(),
            "key": key.map(|key| key.id.to_string()),
            "key_name": key.map(|key| key.name.clone()),
            "tenant": key.map(|key| key.tenant.0.clone()),
            "method": request.method().as_str(),
            "path": path,
        });
        Some(Action { line })
    }

    /// Writes down what became of it.
    pub(crate) fn write(&self, action: Action, status: StatusCode) {
        let mut line = action.line;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line["time"] = json!(time.as_secs_f64());
        line["status"] = status.as_u16().into();
        tracing::info!(target: "audit", %line, "an administrator's request");
        let Some(file) = &self.file else { return };
        let mut text = line.to_string();
        text.push('\n');
        // One write, so that lines of several gateways do not mix.
        let written = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(text.as_bytes());
        if let Err(error) = written {
            tracing::error!(%error, "the audit log cannot be written");
        }
    }
}
