//! What is refused about a `tokenizer.json`.

#![allow(clippy::unwrap_used)]

use ashlar_tokenizer::Tokenizer;

#[test]
fn an_added_token_that_the_vocabulary_would_number_otherwise_is_refused() {
    let with = |id: u32, vocabulary: &str| {
        let json = format!(
            r#"{{"version":"1.0","added_tokens":[{{"id":{id},"content":"<end>","single_word":false,"lstrip":false,
                "rstrip":false,"normalized":false,"special":true}}],"pre_tokenizer":null,"post_processor":null,
                "normalizer":null,"truncation":null,"padding":null,
                "decoder":{{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}},
                "model":{{"type":"BPE","vocab":{{{vocabulary}}},"merges":[]}}}}"#
        );
        Tokenizer::from_json(&json).map(|tokenizer| tokenizer.token_to_id("<end>"))
    };
    assert_eq!(with(2, r#""a":0,"b":1"#).unwrap(), Some(2));
    assert_eq!(with(1, r#""a":0,"<end>":1,"b":2"#).unwrap(), Some(1));
    let refusal = with(1, r#""a":0,"b":2"#).unwrap_err().to_string();
    assert!(refusal.contains("`<end>` has id 1, but the vocabulary makes it 2"), "{refusal}");
}

#[test]
fn only_regular_files_are_read() {
    let dir = std::env::temp_dir().join(format!("ashlar-regular-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    // Whoever reads this one never comes to an end.
    std::os::unix::fs::symlink("/dev/zero", dir.join("tokenizer.json")).unwrap();
    let refused = Tokenizer::from_dir(&dir).unwrap_err();
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(refused.to_string().contains("no regular file"), "{refused}");
}
