//! The little of XML that answers of a service need: elements by name, their text. Nothing is nested under its own name.

/// What stands inside each element `name`, in order.
pub(super) fn blocks<'a>(xml: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    let mut rest = xml;
    std::iter::from_fn(move || {
        loop {
            let at = rest.find(&format!("<{name}"))?;
            let after = &rest[at + 1 + name.len()..];
            // Another element may begin with the same letters.
            let Some(inside) = after.strip_prefix('>').or_else(|| {
                let attributes = after.starts_with(char::is_whitespace);
                attributes.then(|| after.split_once('>')).flatten().map(|(_, inside)| inside)
            }) else {
                rest = after;
                continue;
            };
            let (block, later) = inside.split_once(&format!("</{name}>"))?;
            rest = later;
            return Some(block);
        }
    })
}

/// The text of the first element `name`.
pub(super) fn text(xml: &str, name: &str) -> Option<String> {
    let raw = blocks(xml, name).next()?;
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('&') {
        text.push_str(&rest[..at]);
        let (entity, later) = rest[at + 1..].split_once(';')?;
        text.push(match entity {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            _ => {
                let digits = entity.strip_prefix('#')?;
                let code = match digits.strip_prefix('x') {
                    Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                    None => digits.parse().ok()?,
                };
                char::from_u32(code)?
            }
        });
        rest = later;
    }
    text.push_str(rest);
    Some(text)
}

/// Text as it stands inside an element.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_by_their_whole_name() {
        let xml = "<?xml version=\"1.0\"?>\n<List xmlns=\"http://x\"><Keys>no</Keys><Key a='b'>1 &lt;&#x26;&#38;</Key>\
                   <Part><ETag>&quot;e&quot;</ETag></Part><Part><ETag>f</ETag></Part><Key>2</Key></List>";
        assert_eq!(text(xml, "Key").as_deref(), Some("1 <&&"));
        assert_eq!(blocks(xml, "Key").count(), 2);
        let tags: Vec<_> = blocks(xml, "Part").filter_map(|part| text(part, "ETag")).collect();
        assert_eq!(tags, ["\"e\"", "f"]);
        assert_eq!(text(xml, "ETa"), None);
        assert_eq!(text(&escape("a&\"<b>").replace("a", "<K>a"), "K"), None);
        assert_eq!(text(&format!("<K>{}</K>", escape("a&\"<b>")), "K").as_deref(), Some("a&\"<b>"));
    }

    #[test]
    fn damaged_text_is_no_element() {
        let xml = "<A><Key>1&amp;</Key><Key b>2&#xffffffff;</Key></A>";
        for end in 0..xml.len() {
            for name in ["A", "Key"] {
                let _ = text(&xml[..end], name);
            }
        }
        assert_eq!(text("<Key>&nothing;</Key>", "Key"), None);
        assert_eq!(text("<Key>&amp</Key>", "Key"), None);
        assert_eq!(text("<Key>&#x110000;</Key>", "Key"), None);
    }
}
