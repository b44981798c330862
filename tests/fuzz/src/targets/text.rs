//! Tokenizers, chat templates, grammars, and answers of models.

use super::{InputFile, LARGE, SMALL, model_texts, subject, texts};
use crate::mutate::Seed;
use crate::{Memory, Subject, Target};
use anyhow::Result;
use ashlar_grammar::{
    GrammarCompiler, GrammarError, Matcher, ReasoningParser, ToolCallParser, ToolChoice, ToolSpec,
    after_reasoning, tool_grammar,
};
use ashlar_tokenizer::{
    ChatTemplate, ReasoningMarkers, RenderInput, SpecialTokens, TemplateTime, TextStart, Tokenizer,
    ToolFormat,
};
use ashlar_vocabulary::GrammarSpec;
use serde_json::{Map, Value, json};
use std::path::Path;

/// A vocabulary of all bytes and some special tokens.
pub(super) const DEMO_TOKENIZER: &str = include_str!("../../../../crates/model/demo/tokenizer.json");

pub(super) const TOKENIZER: Target =
    Target { name: "tokenizer", about: "tokenizer.json", memory: LARGE, open: tokenizer };

pub(super) const TOKENIZER_CONFIG: Target = Target {
    name: "tokenizer-config",
    about: "tokenizer_config.json: special tokens, templates",
    memory: LARGE,
    open: tokenizer_config,
};

pub(super) const TEMPLATE: Target = Target {
    name: "template",
    about: "a chat template, compiled and rendered",
    // Strings of up to 100 MB are the engine's own bound for what repeats one.
    memory: Memory { fixed: 384 << 20, per_byte: 4096 },
    open: template,
};

pub(super) const SCHEMA: Target =
    Target { name: "schema", about: "a JSON schema, compiled and followed", memory: LARGE, open: schema };

pub(super) const REGEX: Target =
    Target { name: "regex", about: "a regular expression in a schema", memory: LARGE, open: regex };

pub(super) const TOOLS: Target =
    Target { name: "tools", about: "tools as grammars of calls", memory: LARGE, open: tools };

pub(super) const ANSWER: Target =
    Target { name: "answer", about: "a model's answer: reasoning, calls, text", memory: SMALL, open: answer };

/// Encodes and decodes with it, on a thread of its own: threads keep a cache for each tokenizer that they have ever used, as long as
/// they live.
pub(super) fn use_tokenizer(tokenizer: &Tokenizer) {
    std::thread::scope(|scope| {
        // A panic has been heard already.
        let _ = scope.spawn(|| encode_and_decode(tokenizer)).join();
    });
}

fn encode_and_decode(tokenizer: &Tokenizer) {
    let text = "a ab  abc\u{301} <s> \u{1F600}\n12 <|end|>\0";
    if let Ok(encoded) = tokenizer.encode_with_starts(text, true) {
        let _ = tokenizer.decode(&encoded.ids, false);
    }
    let mut decoder = tokenizer.incremental(SpecialTokens::Hide, TextStart::Continuation);
    for id in [0, 1, 2, 3, 255, 256, 300, u32::MAX] {
        let _ = decoder.push(id);
    }
    let _ = decoder.finish();
}

fn tokenizer(_: &Path) -> Result<Subject> {
    let llama = json!({"version": "1.0", "added_tokens": [
        {"id": 3, "content": "<s>", "single_word": false, "lstrip": true, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true, "ignore_merges": false, "vocab": {"<unk>": 0, "▁": 1, "a": 2, "<s>": 3, "▁a": 4, "<0x0A>": 5}, "merges": [["▁", "a"]]}});
    let qwen = json!({"version": "1.0", "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġa": 4}, "merges": ["a b", "Ġ a"]}});
    let own = "BPE WordLevel Unigram WordPiece ByteLevel Metaspace Digits Split Punctuation NFC NFKC Lowercase Strip StripAccents Precompiled BertNormalizer Regex String (a+)+$ (?:a|a)*b (.*)* (?=a)* \\1 unk_id byte_fallback dropout 0.5 -1 4294967295 4194304 4194305 added_tokens truncation padding max_length stride BatchLongest Fixed pad_to_multiple_of continuing_subword_prefix end_of_word_suffix precompiled_charsmap";
    let corpus = texts([llama.to_string(), qwen.to_string(), DEMO_TOKENIZER.to_owned()].map(Seed::json), own);
    Ok(subject(corpus, |input| {
        let Ok(json) = std::str::from_utf8(input) else { return false };
        let Ok(tokenizer) = Tokenizer::from_json(json) else { return false };
        use_tokenizer(&tokenizer);
        true
    }))
}

fn tokenizer_config(directory: &Path) -> Result<Subject> {
    let model = model_texts(directory)?;
    let seeds = [
        json!({"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>", "lstrip": false}, "chat_template": TEMPLATES[0]}).to_string(),
        json!({"eos_token": "<|end|>", "chat_template": [{"name": "default", "template": TEMPLATES[1]}, {"name": "tool_use", "template": TEMPLATES[0]}]}).to_string(),
    ];
    let own = "bos_token eos_token pad_token content chat_template name template default tool_use <tool_call> [TOOL_CALLS] <|python_tag|> <think> </think>";
    let corpus = texts(seeds.map(Seed::json), own);
    let file = InputFile::new(&model, "tokenizer_config.json")?;
    let special = InputFile::new(&model, "special_tokens_map.json")?;
    Ok(subject(corpus, move |input| {
        file.put(input);
        special.put(input);
        let Ok(tokenizer) = Tokenizer::from_dir(&model) else { return false };
        let _ = (tokenizer.tool_format(), tokenizer.reasoning(), tokenizer.end_token_id());
        true
    }))
}

/// A plain one; one of a model that reasons and calls tools; one with macros and namespaces.
pub(super) const TEMPLATES: [&str; 3] = [
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{%- if tools %}{{- '<|system|>' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|end|>' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}{%- for call in message.tool_calls %}{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}{%- elif message.role == 'tool' %}{{- '<tool_response>' ~ message.content ~ '</tool_response>' }}{%- else %}{{- '<|user|>' ~ (message.reasoning_content | default('')) ~ (message.content | trim) }}{%- endif %}{{- '<|end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>' }}{%- endif %}{%- endif %}",
    "{% macro part(x, n=2) -%}{% for i in range(n) %}{{ x[:3] | upper }}{% endfor %}{%- endmacro %}{% set ns = namespace(found=false) %}{% for m in messages | reverse if m.role != 'system' %}{% if loop.first and not ns.found %}{% set ns.found = true %}{% endif %}{{ part(m.content) ~ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ raise_exception('none') }}{% endfor %}{{ strftime_now('%d %b %Y') }}{{ messages | length // 2 ** 3 % 7 }}{% if messages[0].content is string and 'x' in messages[-1].content %}{% break_me %}{% endif %}",
];

fn conversation() -> Value {
    json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 + 34?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 34}}}]},
        {"role": "tool", "tool_call_id": "1", "content": "46"},
        {"role": "user", "content": "Thanks"},
    ])
}

fn template(_: &Path) -> Result<Subject> {
    let last = TEMPLATES[2].replace("{% break_me %}", "{% set x = 1 %}");
    let own = "{% %} {{ }} {# #} {%- -%} for endfor if elif else endif set endset macro endmacro call endcall filter endfilter raw endraw break continue include import block extends loop.index loop.previtem loop.cycle(1,2) namespace() range(10**9) range(1000) messages tools kwargs | tojson(indent=4) |join |replace('','aaaaaaaa') |indent(9999) |format |sort |unique |batch(2) |slice(2) |map |select |groupby('role') |dictsort |urlize |center(99999) |wordwrap |round(400) |int |float |string |list |items |tojson ~ * ** // % <2147483647 -1 [::-1] [1:10:2] .split() .replace('a','aa') .format() .ljust(99999999) .strip() .items() .join() 'a'*1000000 '%s'%'a' recursive loop(messages) self caller() varargs undefined none true {%setx='a'%} {%foriinrange(40)%} 9223372036854775807 -9223372036854775808 1e308";
    let mut corpus = texts([TEMPLATES[0].to_owned(), TEMPLATES[1].to_owned(), last], own);
    corpus.words.extend(
        [
            "{% for i in range(60) %}",
            "{% set x %}",
            "{% filter indent(100000) %}",
            "{{ part(part(x)) }}",
            " is defined",
            " in ",
            "| tojson(indent=100000) ",
            "{% endfor %}",
            "{% endset %}",
            "((((((((",
        ]
        .map(|text| text.as_bytes().to_vec()),
    );
    // What a long template costs the engine nobody bounds.
    corpus.bytes_max = Some(6 << 10);
    let (messages, kwargs) = (conversation(), Map::new());
    let tools = json!([{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]);
    Ok(subject(corpus, move |input| {
        let Ok(source) = std::str::from_utf8(input) else { return false };
        let special = json!({"bos_token": "<s>", "eos_token": "</s>"});
        let Ok(template) = ChatTemplate::new(source, None, special.as_object().cloned().unwrap_or_default())
        else {
            return false;
        };
        let input = RenderInput {
            messages: &messages,
            tools: Some(&tools),
            add_generation_prompt: true,
            kwargs: &kwargs,
            now: TemplateTime::default(),
        };
        template.render(&input).is_ok()
    }))
}

/// A compiler for the vocabulary of bytes.
fn compiler() -> Result<(Tokenizer, GrammarCompiler)> {
    let directory = tempfile::tempdir()?;
    let tokenizer = Tokenizer::from_dir(model_texts(directory.path())?)?;
    let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size())?;
    Ok((tokenizer, compiler))
}

/// Compiles a grammar and takes the first allowed token some times over.
fn follow(compiler: &GrammarCompiler, spec: &GrammarSpec) -> bool {
    let mut matcher = match Matcher::new(compiler, spec) {
        Ok(matcher) => matcher,
        // Of our own making, not the client's.
        Err(GrammarError::Internal(reason)) => panic!("the grammar engine failed: {reason}"),
        Err(_) => return false,
    };
    let mut mask = vec![0; matcher.mask_len()];
    for step in 0..24_u32 {
        if matcher.mask(&mut mask).is_err() {
            return false;
        }
        let is_allowed = |token: &u32| mask[*token as usize / 32] >> (token % 32) & 1 == 1;
        let allowed: Vec<u32> = (0..mask.len() as u32 * 32).filter(is_allowed).collect();
        // Not always the same one, or every answer would be of white space.
        let token = allowed.get(step as usize % allowed.len().clamp(1, 7)).copied();
        if token.is_none_or(|token| matcher.accept(token).is_err()) || matcher.has_ended() {
            break;
        }
    }
    true
}

const SCHEMA_WORDS: &str = "type object array string number integer boolean null properties patternProperties additionalProperties required items prefixItems minItems maxItems uniqueItems minLength maxLength pattern format date-time email uuid ipv4 uri minimum maximum exclusiveMinimum multipleOf enum const anyOf oneOf allOf not if then else $ref $defs definitions # #/$defs/a #/$defs/b #/properties/a dependentRequired unevaluatedProperties minProperties maxProperties contains propertyNames $id $anchor $dynamicRef x-guidance whitespace_pattern item_separator coerce_one_of 10000 10001 1e308 -0.0 0.1 1e-300";

const REGEXES: &[&str] = &[
    "^[a-z]{2,9}$",
    "(a|b)*c",
    "\\d+(\\.\\d+)?",
    "[^\\x00-\\x1f]+",
    "(foo|bar){1,200}",
    "\\p{L}+\\s\\w{0,50}",
    "(?i)abc|(?:x(?:y(?:z)?)?)",
    "a{1000}",
    "((a{1,9}){1,9}){1,9}",
    "(?=a)b",
    "[a-\\u00e9]",
];

pub(super) fn schemas() -> Vec<String> {
    vec![
        json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}, "required": ["name"], "additionalProperties": false}).to_string(),
        json!({"$defs": {"a": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}}]}, "b": {"type": "number", "multipleOf": 0.5}}, "allOf": [{"$ref": "#/$defs/a"}, {"oneOf": [{"properties": {"x": {"const": 1}}}, {"properties": {"y": {"$ref": "#/$defs/b"}}}]}]}).to_string(),
        json!({"type": "string", "pattern": "^(\\d{3}-)?[a-f]+$", "minLength": 2}).to_string(),
        json!({"type": "string", "format": "date-time"}).to_string(),
        json!({"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 1e6}, "minItems": 1, "maxItems": 4}).to_string(),
        json!({"type": "object", "patternProperties": {"^x_": {"type": "string"}}, "additionalProperties": {"type": "integer"}, "minProperties": 1}).to_string(),
    ]
}

fn schema(_: &Path) -> Result<Subject> {
    let (_, compiler) = compiler()?;
    Ok(subject(texts(schemas().into_iter().map(Seed::json), SCHEMA_WORDS), move |input| {
        let Ok(source) = std::str::from_utf8(input) else { return false };
        follow(&compiler, &GrammarSpec::JsonSchema(source.to_owned()))
    }))
}

fn regex(_: &Path) -> Result<Subject> {
    let (_, compiler) = compiler()?;
    let own = "( ) [ ] { } | * + ? . ^ $ \\ \\b \\B \\d \\D \\w \\W \\s \\S \\p{L} \\p{Greek} \\P{N} \\x{10FFFF} \\u0000 \\Q \\E (?: (?i) (?s) (?=x) (?!x) (?<=x) (?<n>a) \\1 \\k<n> {0} {1,} {1000} {99999} {1,1000}{1,1000} (a*)* (a|aa)+ [^] [a-z&&[^b]] [[:alpha:]] .{0,5000} ~ & \u{1F600}";
    Ok(subject(texts(REGEXES.iter().copied(), own), move |input| {
        let Ok(pattern) = std::str::from_utf8(input) else { return false };
        follow(&compiler, &GrammarSpec::JsonSchema(json!({"type": "string", "pattern": pattern}).to_string()))
    }))
}

fn tools(_: &Path) -> Result<Subject> {
    let (tokenizer, compiler) = compiler()?;
    let parameters: Vec<Value> =
        schemas().iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
    let seeds = parameters.iter().map(|schema| {
        json!([{"name": "add", "parameters": schema}, {"name": "say \"x\"\n", "parameters": null}])
            .to_string()
    });
    let own = [
        SCHEMA_WORDS,
        "name parameters \" \\ /* */ // %json %regex %ignore start: <[0]> <|end|> <tool_call> lazy",
    ]
    .join(" ");
    let markers = ReasoningMarkers { start: "<think>".into(), end: "</think>".into() };
    Ok(subject(texts(seeds.map(Seed::json), &own), move |input| {
        let Ok(Value::Array(listed)) = serde_json::from_slice(input) else { return false };
        let tools: Vec<ToolSpec> = listed
            .into_iter()
            .take(128)
            .map(|tool| ToolSpec {
                name: tool["name"].as_str().unwrap_or_default().to_owned(),
                parameters: tool["parameters"].clone(),
            })
            .collect();
        let format = [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Mistral][input.len() % 3];
        let choice = if input.len() % 2 == 0 { ToolChoice::Auto } else { ToolChoice::Required };
        let Some(spec) = tool_grammar(&tools, &choice, format, true, &tokenizer) else { return false };
        let _ = follow(&compiler, &after_reasoning(&spec, &markers, input.len() % 5 == 0, &tokenizer));
        follow(&compiler, &spec)
    }))
}

fn answer(_: &Path) -> Result<Subject> {
    let seeds = [
        "<think>\nwell\n</think>\n\nIt is 46.",
        "Let me see. <tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 12, \"b\": [1, {\"c\": \"\\u0041\"}]}}\n</tool_call>\n<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>",
        "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1}}, {\"name\": \"x\", \"arguments\": {}}]",
        "<|python_tag|>{\"name\": \"add\", \"parameters\": {\"a\": 1}}; {\"name\": \"add\", \"parameters\": {}}",
    ];
    let own = "<think> </think> <tool_call> </tool_call> [TOOL_CALLS] <|python_tag|> {\"name\": \"arguments\": \"parameters\": \"add\" \\u \\ud800 \\\" { } [ ] ; ,";
    Ok(subject(texts(seeds, own), |input| {
        let text = String::from_utf8_lossy(input);
        let markers = ReasoningMarkers { start: "<think>".into(), end: "</think>".into() };
        let mut reasoning = ReasoningParser::new(markers, input.len() % 2 == 0);
        for format in [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Mistral] {
            let names = if input.len() % 3 == 0 { vec!["add".to_owned()] } else { Vec::new() };
            let mut parser = ToolCallParser::new(format, names);
            for piece in text.split_inclusive(' ') {
                let _ = parser.push(piece);
            }
            let _ = parser.finish();
        }
        for piece in text.split_inclusive('<') {
            let _ = reasoning.push(piece);
        }
        let _ = reasoning.finish();
        true
    }))
}
