//! Several blobs under one id.

use crate::suite::{Place, content};
use ashlar_store::blobs::manifest::{MANIFEST_ENTRIES_MAX, NAME_BYTES_MAX};
use ashlar_store::blobs::{BlobError, BlobInfo, Blobs, Manifest};
use ashlar_vocabulary::BlobId;

pub(crate) async fn run(blobs: &Blobs, place: &dyn Place) {
    manifests_come_back_and_equal_ones_have_one_id(blobs).await;
    a_manifest_names_only_what_is_stored(blobs).await;
    names_are_plain(blobs).await;
    other_blobs_are_no_manifests(blobs).await;
    a_damaged_manifest_is_told(blobs, place).await;
}

async fn manifests_come_back_and_equal_ones_have_one_id(blobs: &Blobs) {
    let (a, b) = (blobs.put(b"a").await.unwrap(), blobs.put(b"bb").await.unwrap());
    let mut one = Manifest::default();
    one.insert("rank-1/moments.safetensors", b).unwrap();
    one.insert("rank-0/moments.safetensors", a).unwrap();
    let mut other = Manifest::default();
    other.insert("rank-0/moments.safetensors", a).unwrap();
    other.insert("rank-1/moments.safetensors", b).unwrap();
    let info = blobs.put_manifest(&one).await.unwrap();
    assert_eq!(blobs.put_manifest(&other).await.unwrap(), info);
    let found = blobs.get_manifest(info.id).await.unwrap();
    assert_eq!(found, one);
    assert_eq!(found.bytes(), 3);
    let entry = found.get("rank-1/moments.safetensors").unwrap();
    assert_eq!((entry.blob, entry.bytes), (b.id, 2));
    assert_eq!(found.get("rank-2/moments.safetensors"), None);
    let names: Vec<_> = found.entries().map(|(name, _)| name).collect();
    assert_eq!(names, ["rank-0/moments.safetensors", "rank-1/moments.safetensors"]);
    // The bytes are what later versions must read; this test pins them.
    let bytes = blobs.read(info.id, 1 << 20).await.unwrap();
    let expected = format!(
        r#"{{"ashlar_manifest":1,"entries":{{"rank-0/moments.safetensors":{{"blob":"{}","bytes":1}},"rank-1/moments.safetensors":{{"blob":"{}","bytes":2}}}}}}"#,
        a.id, b.id
    );
    assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    let empty = blobs.put_manifest(&Manifest::default()).await.unwrap();
    assert_eq!(blobs.get_manifest(empty.id).await.unwrap(), Manifest::default());
}

async fn a_manifest_names_only_what_is_stored(blobs: &Blobs) {
    let a = blobs.put(b"a").await.unwrap();
    let mut manifest = Manifest::default();
    manifest.insert("longer", BlobInfo { id: a.id, bytes: 2 }).unwrap();
    assert!(matches!(blobs.put_manifest(&manifest).await, Err(BlobError::Invalid(_))));
    let absent = BlobId([3; 32]);
    let mut manifest = Manifest::default();
    manifest.insert("absent", BlobInfo { id: absent, bytes: 2 }).unwrap();
    assert_eq!(blobs.put_manifest(&manifest).await, Err(BlobError::NotFound(absent)));
    assert_eq!(blobs.get_manifest(absent).await, Err(BlobError::NotFound(absent)));
}

async fn names_are_plain(blobs: &Blobs) {
    let a = blobs.put(b"a").await.unwrap();
    let mut manifest = Manifest::default();
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    for name in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a b", "a\\b", "a\0", "é", &long] {
        assert!(matches!(manifest.insert(name, a), Err(BlobError::Invalid(_))), "{name:?}");
        // Nor from outside.
        let record = serde_json::json!({
            "ashlar_manifest": 1, "entries": { name: { "blob": a.id.to_string(), "bytes": 1 } }
        });
        let info = blobs.put(record.to_string().as_bytes()).await.unwrap();
        assert!(matches!(blobs.get_manifest(info.id).await, Err(BlobError::Manifest { .. })), "{name:?}");
    }
    for name in ["a", "...", "a.b-c_D9", "a/b/c", &long[1..]] {
        manifest.insert(name, a).unwrap();
        assert!(matches!(manifest.insert(name, a), Err(BlobError::Invalid(_))), "twice");
    }
    let already = manifest.entries().len();
    for number in already..MANIFEST_ENTRIES_MAX {
        manifest.insert(&format!("n{number}"), a).unwrap();
    }
    assert!(matches!(manifest.insert("one-more", a), Err(BlobError::Invalid(_))));
}

async fn other_blobs_are_no_manifests(blobs: &Blobs) {
    let a = blobs.put(b"a").await.unwrap();
    let entry = format!(r#"{{"blob":"{}","bytes":1}}"#, a.id);
    for text in [
        String::new(),
        "null".into(),
        "{}".into(),
        r#"{"ashlar_manifest":1}"#.into(),
        r#"{"ashlar_manifest":"1","entries":{}}"#.into(),
        r#"{"ashlar_manifest":1,"entries":{}} {}"#.into(),
        r#"{"ashlar_manifest":1,"entries":{},"hidden-word":1}"#.into(),
        r#"{"ashlar_manifest":1,"entries":{"a":{"blob":"hidden-word","bytes":1}}}"#.into(),
        format!(r#"{{"ashlar_manifest":1,"entries":{{"a":{}}}}}"#, entry.replace(":1}", ":-1}")),
        format!(r#"{{"ashlar_manifest":1,"entries":{{"a":{}}}}}"#, entry.replace("sha256", "SHA256")),
    ] {
        let info = blobs.put(text.as_bytes()).await.unwrap();
        let error = blobs.get_manifest(info.id).await.expect_err(&text);
        assert!(matches!(error, BlobError::Manifest { id, .. } if id == info.id), "{text}: {error}");
        assert!(!error.to_string().contains("hidden-word"), "{error}");
    }
    let later = blobs.put(br#"{"ashlar_manifest":2,"other":[]}"#).await.unwrap();
    let error = blobs.get_manifest(later.id).await.unwrap_err().to_string();
    assert!(error.contains("version 2, this program reads 1"), "{error}");
}

async fn a_damaged_manifest_is_told(blobs: &Blobs, place: &dyn Place) {
    let a = blobs.put(b"a").await.unwrap();
    let mut manifest = Manifest::default();
    manifest.insert("a", a).unwrap();
    let info = blobs.put_manifest(&manifest).await.unwrap();
    // Still good JSON, another name.
    place.change(&content(info.id), &|bytes| {
        let at = bytes.windows(3).position(|three| three == b"\"a\"").unwrap();
        bytes[at + 1] = b'b';
    });
    assert!(matches!(blobs.get_manifest(info.id).await, Err(BlobError::Corrupt { .. })));
}
