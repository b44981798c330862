//! Layers of a configuration, and errors that name file, line and key, and never a value.

use ashlar_service_kit::config::{ConfigError, Draft, Schema, Sources};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A node.
#[derive(Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Node {
    /// Its name,
    /// which is unique.
    name: String,
    #[serde(default = "default_port")]
    port: u16,
    #[serde(default)]
    share: f64,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    mode: Option<Mode>,
    #[serde(default)]
    store: Option<String>,
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    pairs: Vec<Pair>,
}

fn default_port() -> u16 {
    7410
}

#[derive(Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    memory_bytes: Option<u64>,
    shared: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { memory_bytes: None, shared: true }
    }
}

#[derive(Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// At once.
    Fast,
    /// To the bit.
    Exact,
}

#[derive(Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Pair {
    a: String,
    bytes: u64,
}

struct Given {
    folder: tempfile::TempDir,
    sources: Sources,
}

fn given(text: &str, environment: &[(&str, &str)], settings: &[&str]) -> Given {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("node.toml");
    std::fs::write(&file, text).expect("written");
    let environment = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
    let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
    Given { folder, sources: Sources { file: Some(file), environment, settings } }
}

impl Given {
    fn draft(&self) -> Result<Draft, ConfigError> {
        Draft::gather(Schema::of::<Node>("node"), &self.sources)
    }

    fn node(&self) -> Node {
        self.draft().and_then(|draft| draft.finish()).expect("a good configuration")
    }

    /// What is wrong, without the temporary folder.
    fn refusal(&self) -> String {
        let error = self.draft().and_then(|draft| draft.finish::<Node>()).expect_err("refused").to_string();
        error.replace(&format!("{}/", self.folder.path().display()), "")
    }
}

fn refusal(text: &str) -> String {
    given(text, &[], &[]).refusal()
}

#[test]
fn flags_go_before_the_environment_before_the_file_before_defaults() {
    let text = "name = \"file\"\nport = 1\nshare = 0.5\n";
    assert_eq!(given("name = \"file\"\n", &[], &[]).node().port, 7410);
    let environment = [("ASHLAR_NODE__PORT", "2"), ("ASHLAR_NODE__NAME", "environment"), ("OTHER", "x")];
    let node = given(text, &environment, &["port=3"]).node();
    assert_eq!((node.name.as_str(), node.port, node.share), ("environment", 3, 0.5));
}

#[test]
fn a_variable_reaches_into_a_table_and_leaves_its_other_keys() {
    let text = "name = \"a\"\n[limits]\nmemory_bytes = 5\n";
    let node = given(text, &[("ASHLAR_NODE__LIMITS__SHARED", "false")], &[]).node();
    assert_eq!(node.limits, Limits { memory_bytes: Some(5), shared: false });
    let node =
        given(text, &[("ASHLAR_NODE__LIMITS", "{ memory_bytes = 6 }")], &["limits.shared=false"]).node();
    assert_eq!(node.limits, Limits { memory_bytes: Some(6), shared: false });
}

#[test]
fn text_needs_no_quotes_and_numbers_may_be_names() {
    let environment = [
        ("ASHLAR_NODE__NAME", "123"),
        ("ASHLAR_NODE__STORE", "redis://redis:6379/0"),
        ("ASHLAR_NODE__SHARE", "1"),
        ("ASHLAR_NODE__NAMES", "a, b"),
        ("ASHLAR_NODE__MODE", "exact"),
        ("ASHLAR_NODE__PAIRS", "[{ a = \"x\", bytes = 1 }]"),
    ];
    let node = given("", &environment, &[]).node();
    assert_eq!((node.name.as_str(), node.store.as_deref()), ("123", Some("redis://redis:6379/0")));
    assert_eq!(
        (node.share, node.names, node.mode),
        (1.0, vec!["a".to_owned(), "b".to_owned()], Some(Mode::Exact))
    );
    assert_eq!(node.pairs, [Pair { a: "x".into(), bytes: 1 }]);
    assert_eq!(given("", &[], &["name=\"quoted\"", "names=[\"c\"]"]).node().names, ["c"]);
}

#[test]
fn an_empty_variable_is_none() {
    let node =
        given("name = \"a\"\n", &[("ASHLAR_NODE__STORE", ""), ("ASHLAR_NODE__PORT_FILE", "")], &[]).node();
    assert_eq!((node.store, node.port), (None, 7410));
}

#[test]
fn a_secret_is_read_from_the_file_that_a_variable_names() {
    let mut given = given("name = \"a\"\n", &[], &[]);
    let secret = given.folder.path().join("secret");
    std::fs::write(&secret, "redis://:planted@redis/0\n").expect("written");
    given.sources.environment = vec![("ASHLAR_NODE__STORE_FILE".into(), secret.into())];
    assert_eq!(given.node().store.as_deref(), Some("redis://:planted@redis/0"));
    let shown = given.draft().expect("gathered").effective(&given.node());
    let store = shown.iter().find(|effective| effective.key == "store").expect("shown");
    assert_eq!(store.value, "redis://:***@redis/0");
    assert!(store.origin.starts_with("ASHLAR_NODE__STORE_FILE (/"), "{}", store.origin);
    given.sources.environment.push(("ASHLAR_NODE__STORE".into(), "redis://x".into()));
    assert_eq!(
        given.refusal(),
        "ASHLAR_NODE__STORE and ASHLAR_NODE__STORE_FILE are both set: leave one of them out"
    );
    given.sources.environment = vec![("ASHLAR_NODE__STORE_FILE".into(), "/nowhere/secret".into())];
    assert!(given.refusal().starts_with("ASHLAR_NODE__STORE_FILE: cannot read /nowhere/secret"));
}

#[test]
fn every_value_says_where_it_comes_from() {
    let given = given(
        "name = \"a\"\n\n[limits]\nmemory_bytes = 5\n",
        &[("ASHLAR_NODE__SHARE", "0.5")],
        &["mode=fast"],
    );
    let draft = given.draft().expect("gathered");
    let shown = draft.effective(&draft.finish::<Node>().expect("good"));
    let origin = |key: &str| {
        let found = shown.iter().find(|effective| effective.key == key).expect("shown");
        found.origin.replace(&format!("{}/", given.folder.path().display()), "")
    };
    assert_eq!(origin("name"), "node.toml:1");
    assert_eq!(origin("limits.memory_bytes"), "node.toml:4");
    assert_eq!((origin("limits.shared"), origin("port")), ("default".into(), "default".into()));
    assert_eq!((origin("share"), origin("mode")), ("ASHLAR_NODE__SHARE".into(), "--set".into()));
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
    assert_eq!(refusal("name = \"a\"\nprot = 2\n"), "node.toml:2: unknown key `prot`; did you mean `port`?");
    assert_eq!(
        refusal("name = \"a\"\nport = 1\n\n[limits]\nmemory = 2\n"),
        "node.toml:5: unknown key `limits.memory`; did you mean `limits.memory_bytes`?"
    );
    assert_eq!(
        refusal("name = \"a\"\n[[pairs]]\na = \"x\"\nbyte = 2\n"),
        "node.toml:2: unknown key `pairs.byte`; did you mean `bytes`?"
    );
    let variable = given("name = \"a\"\n", &[("ASHLAR_NODE__PROT", "1")], &[]).refusal();
    assert_eq!(
        variable,
        "ASHLAR_NODE__PROT: this variable sets no key of the node; did you mean `ASHLAR_NODE__PORT`?"
    );
    let flag = given("name = \"a\"\n", &[], &["zebra_crossing=1"]).refusal();
    assert_eq!(flag, "--set: unknown key `zebra_crossing`; `ashlar config schema node` lists all");
}

#[test]
fn all_problems_are_told_at_once() {
    let refusal = given("prot = 1\n", &[("ASHLAR_NODE__SHARE", "much")], &["port"]).refusal();
    assert!(refusal.starts_with("the configuration has 4 problems\n"), "{refusal}");
    for part in [
        "node.toml:1: unknown key `prot`",
        "ASHLAR_NODE__SHARE: `share`: expected a number",
        "--set: expected key=value",
        "node.toml: `name` is missing: set it in a file, with ASHLAR_NODE__NAME, or with --set name=…",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
}

#[test]
fn a_wrong_value_is_named() {
    assert_eq!(
        refusal("name = \"a\"\nport = \"planted-secret\"\n"),
        "node.toml:2: `port`: expected an integer, found string"
    );
    assert_eq!(refusal("name = \"a\"\nport = 70000\n"), "node.toml:2: `port`: expected u16, found integer");
    let variant = refusal("name = \"a\"\nport = 1\nmode = \"planted-secret\"\n");
    assert!(variant.contains("node.toml:3: `mode`: expected `fast` or `exact`"), "{variant}");
}

#[test]
fn no_error_repeats_a_value() {
    for text in [
        "name = planted-secret\nport = 1\n",
        "name = \"planted-secret\nport = 1\n",
        "name = \"a\"\nport = 1\nlimits = \"planted-secret\"\n",
        "name = \"a\"\nport = 1\nlimits = { memory_bytes = \"planted-secret\" }\n",
        "name = [\"planted-secret\"]\nport = 1\n",
        "name = \"a\"\nname = \"planted-secret\"\nport = 1\n",
        "name = \"a\"\nport = \"plan\\\"ted-secret\"\n",
        "port = 1\nname = 1979-05-27planted-secret\n",
    ] {
        let error = refusal(text);
        assert!(!error.contains("ted-secret"), "{error}");
        assert!(error.contains("node.toml:"), "{error}");
    }
    for (variable, value) in
        [("PORT", "planted"), ("LIMITS", "planted"), ("LIMITS__SHARED", "planted"), ("X", "planted")]
    {
        let variable = format!("ASHLAR_NODE__{variable}");
        let error = given("name = \"a\"\n", &[(&variable, value)], &["planted"]).refusal();
        assert!(error.contains(&variable) && !error.contains("planted"), "{error}");
    }
}

#[test]
fn what_is_no_toml_is_placed() {
    let error = given("name = \"a\"\nport 7\n", &[], &[]).draft().expect_err("refused");
    assert!(matches!(error, ConfigError::Syntax { line: 2, .. }), "{error}");
}

#[test]
fn a_file_that_is_not_there_or_too_large_is_named() {
    let load =
        |file: &Path| Draft::gather(Schema::of::<Node>("node"), &Sources::file(file)).expect_err("refused");
    let error = load(Path::new("/nowhere/node.toml")).to_string();
    assert!(error.contains("/nowhere/node.toml"), "{error}");
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), "#".repeat(2 << 20)).expect("written");
    assert!(load(file.path()).to_string().contains("at most"));
}

#[test]
fn the_schema_has_types_defaults_and_descriptions_of_the_struct() {
    let schema = Schema::of::<Node>("node");
    let key = |path: &str| schema.keys().iter().find(|key| key.path == path).expect("known").clone();
    assert_eq!(key("name").description, "Its name, which is unique.");
    assert!(key("name").required && !key("limits.shared").required);
    assert_eq!((key("port").default, key("limits.shared").default), (Some(7410.into()), Some(true.into())));
    assert_eq!((key("store").default, key("limits.memory_bytes").default), (None, None));
    assert_eq!(key("mode").kind.to_string(), "\"fast\", \"exact\"");
    assert_eq!(key("pairs").kind.to_string(), "a list of tables");
    assert_eq!(schema.variable("limits.shared"), "ASHLAR_NODE__LIMITS__SHARED");
    let supplied = Schema::of::<Node>("node").supplying("name").requiring("port");
    let required: Vec<_> =
        supplied.keys().iter().filter(|key| key.required).map(|key| key.path.clone()).collect();
    assert_eq!(required, ["port"]);
    assert_eq!(supplied.json()["required"], serde_json::json!(["port"]));
}

#[test]
fn problems_of_a_file_come_in_the_order_of_its_lines() {
    let refusal = refusal("name = \"a\"\nprot = 1\n[limits]\nmemory = 2\n");
    let (first, second) = (refusal.find("node.toml:2"), refusal.find("node.toml:4"));
    assert!(first.is_some() && first < second, "{refusal}");
}
