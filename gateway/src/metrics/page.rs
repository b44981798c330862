//! A page in Prometheus' text format, put together from several: each family's head stands once, all its series below.

/// The page.
#[derive(Debug, Default)]
pub(crate) struct MetricsPage {
    families: Vec<Family>,
}

#[derive(Debug, Default)]
struct Family {
    name: String,
    /// `# HELP` and `# TYPE`.
    head: Vec<String>,
    series: Vec<String>,
}

impl MetricsPage {
    /// One that says what `text` says.
    pub(crate) fn new(text: &str) -> MetricsPage {
        let mut page = MetricsPage::default();
        page.add_text(text);
        page
    }

    /// Adds another one's series.
    pub(crate) fn add(&mut self, other: &MetricsPage) {
        for family in &other.families {
            self.family(&family.name, &family.head).series.extend(family.series.iter().cloned());
        }
    }

    /// The text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for line in self.families.iter().flat_map(|family| family.head.iter().chain(&family.series)) {
            text.push_str(line);
            text.push('\n');
        }
        text
    }

    fn add_text(&mut self, text: &str) {
        let mut current = Family::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let name = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
            match name.and_then(|head| head.split(' ').next()) {
                Some(name) if name == current.name => current.head.push(line.to_owned()),
                Some(name) => {
                    self.take_in(std::mem::take(&mut current));
                    current =
                        Family { name: name.to_owned(), head: vec![line.to_owned()], series: Vec::new() };
                }
                None => current.series.push(line.to_owned()),
            }
        }
        self.take_in(current);
    }

    fn take_in(&mut self, family: Family) {
        if !family.head.is_empty() || !family.series.is_empty() {
            self.family(&family.name, &family.head).series.extend(family.series);
        }
    }

    fn family(&mut self, name: &str, head: &[String]) -> &mut Family {
        let at = self.families.iter().position(|family| family.name == name).unwrap_or_else(|| {
            self.families.push(Family { name: name.to_owned(), head: head.to_vec(), series: Vec::new() });
            self.families.len() - 1
        });
        &mut self.families[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_one_head_however_many_pages_have_it() {
        let mut page =
            MetricsPage::new("# HELP a Of a.\n# TYPE a counter\na{m=\"1\"} 1\n\n# TYPE b gauge\nb 2\n");
        page.add(&MetricsPage::new("# TYPE b gauge\nb{m=\"2\"} 3\n\n# TYPE c gauge\nc 4\n"));
        let expected = "# HELP a Of a.\n# TYPE a counter\na{m=\"1\"} 1\n# TYPE b gauge\nb 2\nb{m=\"2\"} 3\n# TYPE c gauge\nc 4\n";
        assert_eq!(page.text(), expected);
    }
}
