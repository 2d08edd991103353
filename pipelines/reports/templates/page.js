// Each table of class "sortable" becomes one of DataTables; what stands in a bar named after it filters it.
for (const table of document.querySelectorAll("table.sortable")) {
  const api = new DataTable(table, {
    autoWidth: false, paging: false, order: [], titleRow: 0,
    layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: null },
    language: { info: "_TOTAL_ rows", infoEmpty: "no row", infoFiltered: "of _MAX_", zeroRecords: "No row matches." },
    columnDefs: [{ targets: "more", visible: false }],
  });
  const bar = document.querySelector(`[data-bar="${table.id}"]`);
  const pick = ({ name, value }) => api.column(`.${name}`).search(value, { exact: value !== "" }).draw();
  for (const select of bar.querySelectorAll("select")) if (select.value) pick(select);
  bar.hidden = false;
  bar.addEventListener("input", ({ target }) => {
    if (target.type === "checkbox") api.columns(".more").visible(target.checked);
    else if (target.type === "search") api.search(target.value).draw();
    else pick(target);
  });
}
