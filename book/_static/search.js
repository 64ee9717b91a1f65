// The excerpts of search results come from the text of a page, not from its buttons and its contents.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // another page
  const { htmlToText } = Search;
  Search.htmlToText = (html, anchor) => {
    const article = new DOMParser().parseFromString(html, "text/html").querySelector("article");
    return htmlToText(article ? `<div role="main">${article.innerHTML}</div>` : html, anchor);
  };
});
