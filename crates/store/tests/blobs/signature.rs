//! Checks signatures as a service does, from what arrived. Written apart from the code that makes them.

use axum::http::{HeaderMap, Method, Uri};
use ring::hmac::{HMAC_SHA256, Key, sign};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the request is signed by the holder of `secret`; else the service's code for what is wrong.
pub(crate) fn check(
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: &[u8],
    access: &str,
    secret: &str,
) -> Result<(), &'static str> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let authorization = text("authorization").ok_or("AccessDenied")?;
    let fields = authorization.strip_prefix("AWS4-HMAC-SHA256 ").ok_or("AccessDenied")?;
    let field = |name: &str| {
        fields
            .split(',')
            .find_map(|field| field.trim().strip_prefix(name)?.strip_prefix('='))
            .ok_or("AccessDenied")
    };
    let (key, scope) = field("Credential")?.split_once('/').ok_or("AccessDenied")?;
    if key != access {
        return Err("InvalidAccessKeyId");
    }
    let parts: Vec<&str> = scope.split('/').collect();
    let [day, region, "s3", "aws4_request"] = parts[..] else { return Err("AccessDenied") };
    let moment = text("x-amz-date").ok_or("AccessDenied")?;
    if !moment.starts_with(day) {
        return Err("AccessDenied");
    }
    let digest = hex(ring::digest::digest(&ring::digest::SHA256, body).as_ref());
    if text("x-amz-content-sha256") != Some(&digest) {
        return Err("XAmzContentSHA256Mismatch");
    }
    let signed: Vec<&str> = field("SignedHeaders")?.split(';').collect();
    let must = |name: &str| name == "host" || name == "range" || name.starts_with("x-amz-");
    if headers.keys().any(|name| must(name.as_str()) && !signed.contains(&name.as_str())) {
        return Err("AccessDenied");
    }
    let mut query: Vec<&str> = uri.query().unwrap_or("").split('&').filter(|pair| !pair.is_empty()).collect();
    query.sort_by_key(|pair| pair.split_once('='));
    let mut canonical = format!("{method}\n{}\n{}\n", uri.path(), query.join("&"));
    for name in &signed {
        canonical += &format!("{name}:{}\n", text(name).ok_or("AccessDenied")?);
    }
    canonical += &format!("\n{}\n{digest}", signed.join(";"));
    let canonical = hex(ring::digest::digest(&ring::digest::SHA256, canonical.as_bytes()).as_ref());
    let to_sign = format!("AWS4-HMAC-SHA256\n{moment}\n{scope}\n{canonical}");
    let mut tag = sign(&Key::new(HMAC_SHA256, format!("AWS4{secret}").as_bytes()), day.as_bytes());
    for part in [region, "s3", "aws4_request", &to_sign] {
        tag = sign(&Key::new(HMAC_SHA256, tag.as_ref()), part.as_bytes());
    }
    if field("Signature")? == hex(tag.as_ref()) { Ok(()) } else { Err("SignatureDoesNotMatch") }
}
