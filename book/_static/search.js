// Order and excerpts of search results. Sphinx's own order takes a page's best word alone, and no page that lacks one.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // another page

  // A word counts for more the fewer pages have it, and by where it stands.
  const PLACES = { text: 1, heading: 2, title: 3 };
  const LEAST = 0.4; // of the best page's score
  const SPELT = { gradcam: "grad-cam", heatmap: "heat map", heatmaps: "heat maps", huggingface: "hugging face", my: "your" };

  // The reference comes after what teaches, but for a function that was asked for by its name.
  Scorer.objPartialMatch = 0;
  Scorer.score = ([page, , , description, score]) =>
    page.startsWith("book/api/checks") || (page.startsWith("book/api/") && !description) ? score / 2 : score;

  const parse = Search._parseQuery;
  Search._parseQuery = (query) => parse(query.replace(/\w+/g, (word) => SPELT[word.toLowerCase()] ?? word));

  const stemmer = new Stemmer();
  const wordsOf = (title) => splitQuery(title.toLowerCase()).map((word) => stemmer.stemWord(word));

  Search.performTermsSearch = (searchTerms) => {
    const { terms, titleterms, titles, alltitles, docnames, filenames } = Search._index;
    const pagesWith = (table, word) => (Object.hasOwn(table, word) ? [table[word]].flat() : []);
    const known = new Set([...Object.keys(terms), ...Object.keys(titleterms)]);
    const asked = [...searchTerms].map((word) => {
      const longer = known.has(word) || word.length < 3 ? [word] : [...known].filter((other) => other.includes(word));
      const pages = new Set(longer.flatMap((one) => [...pagesWith(terms, one), ...pagesWith(titleterms, one)]));
      return { longer, pages, rarity: Math.log(1 + titles.length / Math.max(pages.size, 1)) };
    });

    const headings = titles.map(() => []); // of each page, its title among them
    for (const [words, places] of Object.entries(alltitles))
      for (const [page, id] of places) headings[page].push({ title: words, id, words: wordsOf(words) });

    const found = titles.map((title, page) => {
      const inTitle = wordsOf(title);
      const score = (heading) =>
        asked.reduce((sum, { longer, pages, rarity }) => {
          const among = (words) => longer.some((word) => words.includes(word));
          const place = among(inTitle) ? "title" : among(heading.words) ? "heading" : "text";
          return pages.has(page) ? sum + rarity * PLACES[place] : sum;
        }, 0);
      const top = { title, id: null, words: inTitle };
      const best = [top, ...headings[page]].reduce((a, b) => (score(b) > score(a) ? b : a));
      const all = asked.reduce((sum, { rarity }) => sum + rarity * PLACES.title, 0);
      const named = best.words.filter((word) => asked.some(({ longer }) => longer.includes(word))).length;
      return {
        page,
        best: 2 * named > asked.length ? best : top, // a section that has most of what was asked
        score: (Scorer.title * score(best)) / all + named / best.words.length, // few other words first
      };
    });
    const least = LEAST * Math.max(...found.map(({ score }) => score));
    return found
      .filter(({ score }) => score > 0 && score >= least)
      .map(({ page, best, score }) => [
        docnames[page],
        best.id === null ? titles[page] : `${titles[page]} > ${best.title}`,
        best.id === null ? "" : `#${best.id}`,
        null,
        score,
        filenames[page],
      ]);
  };

  // The excerpts come from the text of a page, not from its buttons and its contents; a term comes with what it means.
  const { htmlToText } = Search;
  Search.htmlToText = (html, anchor) => {
    const article = new DOMParser().parseFromString(html, "text/html").querySelector("article");
    const target = anchor && `#${CSS.escape(anchor.slice(1))}`;
    const meaning = target && article?.querySelector(`dt${target} ~ dd`);
    return meaning?.textContent ?? htmlToText(article ? `<div role="main">${article.innerHTML}</div>` : html, target);
  };
});
