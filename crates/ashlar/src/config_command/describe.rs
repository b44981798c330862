//! Every key with its type, its default and its description.

use super::SchemaArgs;
use anyhow::Result;
use ashlar_service_kit::config::{Key, Schema};

pub(crate) fn run(args: &SchemaArgs) -> Result<()> {
    let schema = args.role.schema();
    if args.json {
        println!("{}", serde_json::to_string_pretty(schema.json())?);
    } else {
        print!("{}", text(&schema));
    }
    Ok(())
}

fn text(schema: &Schema) -> String {
    let role = schema.role();
    let example = schema.keys().first().map_or_else(String::new, |key| schema.variable(&key.path));
    let head = format!(
        "Keys of the {role}. Set them in a file (--config FILE), in the environment ({example}=…, or {example}_FILE=PATH for \
         what is in a file), or with --set KEY=VALUE; what comes later here goes before what comes earlier.\n\n"
    );
    let keys = schema.keys().iter().map(|key| describe(key, &schema.variable(&key.path)));
    wrapped(&head, "") + &keys.collect::<String>()
}

fn describe(key: &Key, variable: &str) -> String {
    let default = match &key.default {
        Some(value) => format!("default {value}"),
        None if key.required => "required".into(),
        None => "no default".into(),
    };
    let head = format!("{}  {}, {default}\n", key.path, key.kind);
    format!("{head}{}    {variable}\n\n", wrapped(&key.description, "    "))
}

/// Lines of at most 100 characters.
fn wrapped(text: &str, indent: &str) -> String {
    let mut lines = String::new();
    for paragraph in text.split_terminator('\n') {
        let mut line = indent.to_owned();
        for word in paragraph.split(' ') {
            if line.chars().count() + word.chars().count() > 100 && line.trim() != "" {
                lines.push_str(line.trim_end());
                lines.push('\n');
                line = indent.to_owned();
            }
            line.push_str(word);
            line.push(' ');
        }
        lines.push_str(line.trim_end());
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use crate::settings::ConfigRole;

    #[test]
    fn every_key_is_described_with_type_default_and_variable() {
        let text = super::text(&ConfigRole::Gateway.schema());
        assert!(text.contains("\nmodel  text, required\n"), "{text}");
        assert!(text.contains("\nlisten  text, default \"127.0.0.1:8080\"\n"), "{text}");
        assert!(text.contains("    ASHLAR_GATEWAY__LISTEN\n"), "{text}");
        let text = super::text(&ConfigRole::Node.schema());
        assert!(text.contains("\nname  text, no default\n"), "{text}");
        assert!(
            text.contains("\nfetch  \"missing\", \"always\", \"never\", default \"missing\"\n"),
            "{text}"
        );
        assert!(text.contains("\nlinks.shared_memory  true or false, default true\n"), "{text}");
        assert!(text.contains("\nlayers.start  an integer, no default\n"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 140), "{text}");
    }
}
