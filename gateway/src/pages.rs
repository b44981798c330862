//! Pages that the binary carries: the dashboard and the API reference, as plain files.
//!
//! Nothing comes from elsewhere, and the browser is told so: scripts and styles only from here, no frames, no forms that leave.

use crate::openai::error::ApiError;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::hash::{DefaultHasher, Hash, Hasher};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of a page.
struct Asset {
    name: &'static str,
    bytes: &'static [u8],
}

macro_rules! assets {
    ($folder:literal: $($name:literal),* $(,)?) => {
        &[$(Asset { name: $name, bytes: include_bytes!(concat!("../", $folder, "/", $name)) }),*]
    };
}

/// The dashboard; its first file is the page.
const DASHBOARD: &[Asset] = assets!(
    "dashboard": "answer.js", "api.js", "app.js", "charts.js", "code.js", "dialog.js", "dom.js", "drain.js", "favicon.svg", "feed.js", "format.js", "health.js", "index.html", "jsonl.js", "layout.js", "node-parts.js", "node-sheet.js", "page-chat.js", "page-cluster.js", "page-keys.js", "page-models.js", "page-requests.js", "page-tuning.js", "pages.css", "picture.js", "poll.js", "settings.js", "style.css", "theme.js", "tiles.js", "tuning-job.js", "tuning-new.js", "view.js"
);

/// The API reference; its first file is the page.
const REFERENCE: &[Asset] = assets!("reference": "index.html", "reference.css", "reference.js");

/// `GET /`.
pub(crate) async fn dashboard(headers: HeaderMap) -> Result<Response, ApiError> {
    serve(DASHBOARD, "index.html", &headers)
}

/// `GET /dashboard/{file}`.
pub(crate) async fn dashboard_file(
    Path(file): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    serve(DASHBOARD, &file, &headers)
}

/// `GET /docs`.
pub(crate) async fn reference(headers: HeaderMap) -> Result<Response, ApiError> {
    serve(REFERENCE, "index.html", &headers)
}

/// `GET /docs/{file}`.
pub(crate) async fn reference_file(
    Path(file): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    serve(REFERENCE, &file, &headers)
}

fn serve(assets: &'static [Asset], name: &str, asked: &HeaderMap) -> Result<Response, ApiError> {
    let Some(asset) = assets.iter().find(|asset| asset.name == name) else {
        return Err(ApiError::not_found("there is no such file: the page is at /", "unknown_url"));
    };
    let tag = tag_of(asset.bytes);
    let known = asked.get(header::IF_NONE_MATCH).is_some_and(|known| *known == tag);
    let mut response = match known {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => asset.bytes.into_response(),
    };
    let headers = response.headers_mut();
    let mut set =
        |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(header::CONTENT_TYPE, kind_of(name));
    set(header::CONTENT_SECURITY_POLICY, POLICY);
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(header::X_FRAME_OPTIONS, "DENY");
    set(header::REFERRER_POLICY, "no-referrer");
    // Asked for each time, and answered in a few bytes where nothing has changed.
    set(header::CACHE_CONTROL, "no-cache");
    headers.insert(header::ETAG, tag);
    Ok(response)
}

fn tag_of(bytes: &[u8]) -> HeaderValue {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    HeaderValue::from_str(&format!("\"{:016x}\"", hasher.finish()))
        .unwrap_or(HeaderValue::from_static("\"\""))
}

fn kind_of(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_of_the_pages_is_in_the_binary_and_the_dashboard_loads_less_than_200_kb() {
        for (folder, assets) in [("dashboard", DASHBOARD), ("reference", REFERENCE)] {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
            let there = std::fs::read_dir(folder).unwrap();
            let there: BTreeSet<String> =
                there.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            let carried: BTreeSet<String> = assets.iter().map(|asset| asset.name.to_owned()).collect();
            assert_eq!(carried, there);
        }
        // What a visit of a page takes: the frame, the page's own module, and all that these name.
        let pages = DASHBOARD.iter().filter(|asset| asset.name.starts_with("page-"));
        for page in pages {
            let mut taken = BTreeSet::new();
            let mut wanted = vec!["index.html", page.name];
            while let Some(name) = wanted.pop() {
                if !taken.insert(name) {
                    continue;
                }
                let text = std::str::from_utf8(file(name).bytes).unwrap();
                let named = DASHBOARD.iter().map(|asset| asset.name).filter(|other| {
                    text.contains(&format!("from './{other}'"))
                        || text.contains(&format!("/dashboard/{other}\""))
                });
                wanted.extend(named);
            }
            assert!(["app.js", "style.css", "dom.js"].iter().all(|name| taken.contains(name)), "{taken:?}");
            let bytes: usize = taken.iter().map(|name| file(name).bytes.len()).sum();
            assert!(bytes < 200_000, "{} takes {bytes} bytes", page.name);
        }
    }

    fn file(name: &str) -> &'static Asset {
        DASHBOARD.iter().find(|asset| asset.name == name).unwrap()
    }

    #[test]
    fn pages_name_no_other_host_and_hold_no_script_of_their_own() {
        for asset in DASHBOARD.iter().chain(REFERENCE) {
            let text = String::from_utf8_lossy(asset.bytes);
            let foreign = text.match_indices("//").filter(|(at, _)| {
                let before = &text[at.saturating_sub(6)..*at];
                before.ends_with("http:") || before.ends_with("https:")
            });
            // Namespaces of SVG are names, not addresses.
            let addresses: Vec<&str> = foreign
                .map(|(at, _)| text[at..].split(['"', '\'', '`', ' ', ')']).next().unwrap_or_default())
                .filter(|address| {
                    !address.starts_with("//www.w3.org/") && !address.starts_with("//127.0.0.1")
                })
                .filter(|address| !address.starts_with("//${"))
                .collect();
            assert!(addresses.is_empty(), "{}: {addresses:?}", asset.name);
            if asset.name.ends_with(".html") {
                assert!(!text.contains("style=") && !text.contains("<style"), "{}", asset.name);
                let from_here = |at: usize| {
                    let tag = text[at..].split('>').next().unwrap_or_default();
                    tag.contains(" src=\"/dashboard/") || tag.contains(" src=\"/docs/")
                };
                assert!(text.match_indices("<script").all(|(at, _)| from_here(at)), "{}", asset.name);
            }
        }
    }
}
